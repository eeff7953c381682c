"""Does every check of secure aggregation, and of what surrounds it, have a test that fails without it?

Each mutant takes one check out of a copy of the package and runs tests against the copy: the attacks, then the unit
tests, then the fuzzers, or those that the mutant names. If no test notices a mutant, its check is untested, and the
program exits with status 1.

    python tests/hostile/secagg/mutation.py                  # all of them, as a Markdown table
    python tests/hostile/secagg/mutation.py --only quorum    # those with a word in their name
    python tests/hostile/secagg/mutation.py --dry-run        # only whether each still finds its check in the sources
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "core/fedtune/core/secagg"
CODEC = "core/fedtune/core/codec"
CLIENT = "client/fedtune/client"
PULLS = f"{CLIENT}/inference"
LIVE_CLIENT = f"{CLIENT}/live"
MANIFEST = "core/fedtune/core/manifest"
PRIVACY = "core/fedtune/core/privacy"
STRATEGIES = "strategies/fedtune/strategies"
FLOWER = "strategies/fedtune/flower"
HOST = "core/fedtune/core/host"
PROTOCOL = "core/fedtune/core/protocol"
SERVER = "server/fedtune/server"
LIVE_SERVER = f"{SERVER}/live"
SUITES = (
    "tests/hostile/test_release.py",
    "tests/hostile/test_device_bounds.py",
    "tests/hostile/secagg/test_lying_round.py",
    "tests/hostile/secagg/test_lying_server.py",
    "tests/hostile/secagg/test_hostile_clients.py",
    "tests/hostile/secagg/test_groups.py",
    "tests/unit/secagg",
    "tests/unit/codec/test_maskable.py",
    "tests/unit/codec/test_noised.py",
    "tests/unit/privacy",
    "tests/unit/strategies/test_round.py",
    "tests/unit/strategies/test_group_testing.py",
    "tests/hostile/test_round_terms.py",
    "tests/unit/manifest",
    "tests/hostile/secagg/test_fuzz.py",
)


TERMS = ("tests/hostile/test_round_terms.py", "tests/unit/manifest")
RELEASES = ("tests/hostile/test_release.py", "tests/unit/manifest")
JOINING = (
    "tests/unit/manifest/test_fleet_log.py",
    "tests/live/test_joining.py::test_the_server_takes_only_a_log_that_continues_its_own",
    "tests/live/test_joining.py::test_strange_bytes_at_the_one_open_door_change_nothing",
    "tests/live/test_joining.py::test_the_requests_that_wait_are_bounded",
    "tests/live/test_bad_input.py::test_an_invitation_that_is_none_is_refused",
)
DECODERS = ("tests/hostile/test_decoders.py",)
GUARD = ("tests/hostile/live/test_guard.py",)
LIAR = ("tests/hostile/live/test_lying_line.py",)
CONTRACT = ("tests/live/test_flower_contract.py",)
REQUESTS = ("tests/unit/core/test_signed_requests.py", *GUARD)
PULL = ("tests/hostile/live/test_pull.py",)
CONNECTIONS = ("tests/unit/core/test_connections.py",)
SERVE = (
    "tests/unit/export/test_server.py::test_without_a_token_no_page_of_elsewhere_can_ask",
    "tests/unit/export/test_server.py::test_a_request_without_a_host_or_with_two_is_refused",
)
JOBS = ("tests/unit/server/test_service.py",)


@dataclass(frozen=True)
class Mutant:
    """A check, and the edit that removes it: `old` occurs exactly once in `file` of the package.

    Args:
        suites: the tests to run, those first that are the quickest to notice.
    """

    check: str
    file: str
    old: str
    new: str
    package: str = PACKAGE
    suites: tuple[str, ...] = SUITES


UNCHANGED = Mutant("none", "__init__.py", "__all__ = [", "__all__ = [")
MUTANTS = (
    # the client's checks of a configuration
    Mutant(
        "configuration contradicts itself",
        "client_checks.py",
        "found := config_problems(config)",
        "found := []",
    ),
    Mutant("ring cannot overflow", "config.py", "count * segment.limit >= 1 << segment.bits", "False"),
    Mutant("client invited twice", "config.py", "if repeated:", "if False:"),
    Mutant("client's own policy", "client_checks.py", "found := policy_problems(config, policy)", "found := []"),
    Mutant(
        "bound: sums of a job",
        "client_checks.py",
        "policy.max_sums is not None and served.sums >= policy.max_sums",
        "False",
    ),
    # differential privacy
    Mutant("privacy: budget", "client_checks.py", "if spent + policy.rho > policy.most_rho * _ROUNDING:", "if False:"),
    Mutant("privacy: budget without privacy", "client_checks.py", "    if not policy.rho:\n", "    if False:\n"),
    Mutant("privacy: counted", "round_log.py", "rho=self.rho + rho", "rho=self.rho"),
    Mutant(
        "privacy: noise",
        "noised.py",
        "        if self.noised:\n            whole",
        "        if False:\n            whole",
        CODEC,
    ),
    Mutant(
        "privacy: half of the noise",
        "noised.py",
        "noise.variance, whole.size",
        "type(noise.variance)(noise.variance.parts // 2), whole.size",
        CODEC,
    ),
    Mutant("privacy: norm after rounding", "bounded_rounding.py", "<= longest**2", "<= 4 * longest**2", PRIVACY),
    Mutant(
        "privacy: rho of terms",
        "round_terms.py",
        "_six_digits(rho_of_round(job.privacy))",
        "_six_digits(uplink.rho)",
        MANIFEST,
    ),
    Mutant(
        "privacy: who adds noise",
        "round_terms.py",
        "(bool(uplink.noised), job.privacy.mode",
        '(job.privacy.mode == "distributed", job.privacy.mode',
        MANIFEST,
    ),
    Mutant(
        "privacy: certain noise",
        "secure_rounds.py",
        "if any(counted > sure",
        "if any(False and counted > sure",
        CLIENT,
    ),
    Mutant(
        "privacy: clip of terms",
        "round_terms.py",
        '    if job.privacy.mode != "off":\n        return job.privacy.clip',
        "    if False:\n        return job.privacy.clip",
        MANIFEST,
    ),
    Mutant(
        "privacy: no scores",
        "round_terms.py",
        '    if job.privacy.mode != "off":\n        raise',
        "    if False:\n        raise",
        MANIFEST,
        ("tests/federation/test_privacy.py",),
    ),
    Mutant("bound: sums are counted", "round_log.py", "sums=self.sums + 1", "sums=self.sums"),
    Mutant("bound: difference of sums", "client_checks.py", "if 0 < apart < policy.min_difference:", "if False:"),
    Mutant("bound: same clients again", "client_checks.py", "if 0 < apart < policy", "if apart < policy"),
    Mutant("bound: earlier sums stay known", "client_session.py", "keep=self.policy.min_difference > 0", "keep=False"),
    Mutant("bound: devices of the fleet", "device_home.py", "len(after.devices) > most", "False", LIVE_CLIENT),
    Mutant(
        "bound: owner's policy",
        "registered_device.py",
        "policy_of(home.config.bounds, self._planned.terms)",
        "Policy()",
        LIVE_CLIENT,
    ),
    Mutant("bound: warning", "registered_device.py", "if 0 < apart < self", "if False and self", LIVE_CLIENT),
    Mutant("threshold against both shares", "graph.py", "if t < majority(n, colluding):", "if False:"),
    Mutant("quorum is a majority of the honest", "graph.py", "if q < majority(n, colluding):", "if False:"),
    Mutant("minimum at least the quorum", "graph.py", "if thresholds.minimum < q:", "if False:"),
    Mutant(
        "complete graph for small cohorts",
        "graph.py",
        "if n <= COMPLETE_UP_TO:\n        return [",
        "if False:\n        return [",
    ),
    Mutant("sparse threshold", "graph.py", "if 2 * t <= k + worst:", "if False:"),
    Mutant(
        "sparse graph stays connected", "graph.py", "if not _stays_connected(n, k, min(", "if False and (n, k, min("
    ),
    Mutant("policy's minimum of survivors", "config.py", "if config.minimum < policy.min_survivors:", "if False:"),
    Mutant("policy's minimum of a tier", "config.py", "if lowest < least:", "if False:"),
    # the server's bounds on what one client's words can do
    Mutant(
        "mean within the clip",
        "maskable.py",
        "clip_factor(finite_norm(values), self.longest_mean(",
        "max(1.0, 0 * self.longest_mean(",
        CODEC,
    ),
    Mutant(
        "clip within what steps can reach",
        "round_terms.py",
        "    return min(max(adapted, LEAST_SHARE * most), most)\n",
        "    return adapted\n",
        MANIFEST,
    ),
    Mutant(
        "one colluder in the smallest cohort",
        "graph.py",
        "return max(1, part(corrupt, cohort))",
        "return part(corrupt, cohort)",
    ),
    Mutant(
        "who may collude in a tier", "config.py", "least = max(least, colluders(", "least = max(least, 0 * colluders("
    ),
    Mutant("unauthenticated clients in the cohort", "client_checks.py", "    if unknown:", "    if False:"),
    Mutant("own invitation", "client_checks.py", "if not invited or roster", "if roster"),
    Mutant(
        "own pinned identity",
        "client_checks.py",
        "if not invited or roster.keys[client] != public:",
        "if not invited:",
    ),
    Mutant("base and adapter digests", "client_checks.py", "        if theirs != ours:", "        if False:"),
    Mutant("round served before", "client_checks.py", "if mark <= served.last:", "if False:"),
    Mutant(
        "round remembered",
        "client_session.py",
        "        self.log.record(config.job, served.opened(mark))\n",
        "",
    ),
    Mutant(
        "round closed once masked",
        "client_session.py",
        "        self.log.record(config.job, self.log.of(config.job).masked(config.round, self.policy.rho))\n",
        "",
    ),
    # the client's checks of the key list
    Mutant("own entry in the key list", "client_checks.py", "if own not in keys.entries:", "if False:"),
    Mutant("keys unique", "client_checks.py", "entry.mask_key)}) != 2 * len(listed):", "entry.mask_key)}) < 0:"),
    Mutant(
        "keys of small order",
        "client_checks.py",
        "if is_weak(entry.share_key) or is_weak(entry.mask_key):",
        "if False:",
    ),
    Mutant(
        "signatures over keys",
        "client_checks.py",
        "if not roster.verify(client, statement, entry.signature):",
        "if False:",
    ),
    Mutant("enough advertisers", "client_checks.py", '    check_enough(config, advertisers, "advertisers")\n', ""),
    # the client's checks of the encrypted shares
    Mutant("enough sharers", "client_session.py", '        check_enough(config, sharers, "sharers")\n', ""),
    Mutant(
        "number of encrypted shares",
        "client_session.py",
        "if len(delivery.encrypted_shares) != ENCRYPTED_SHARE_BYTES * len(senders):",
        "if False:",
    ),
    Mutant(
        "tag of an encrypted share",
        "client_checks.py",
        "    if opened is None:",
        "    if opened is None and not (opened := bytes(64)):",
    ),
    Mutant(
        "direction of an encrypted share",
        "transcript.py",
        '"encrypted_share", sender, receiver)\n\n    def associated_data',
        '"encrypted_share")\n\n    def associated_data',
    ),
    Mutant(
        "encrypted shares bound to the key list",
        "transcript.py",
        "self.salt = self.digest + config_digest",
        "self.salt = config_digest",
    ),
    Mutant(
        "update within the limit",
        "client_checks.py",
        "if given.size and int(given.max()) > limit:",
        "if False:",
    ),
    # the client's checks of the survivor set and the votes
    Mutant(
        "enough survivors", "client_session.py", '        check_enough(transcript.config, survivors, "survivors")\n', ""
    ),
    Mutant("a tier's own minimum", "config.py", "if by_tier[tier] < config.tier_minimums[tier]:", "if False:"),
    Mutant("sets within the set before", "client_checks.py", "if not found <= frozenset(within):", "if False:"),
    Mutant("sets increasing", "client_checks.py", "if not increasing(listed):", "if False:"),
    Mutant("client in every set", "client_checks.py", "if own is not None and own not in found:", "if False:"),
    Mutant("votes reach the quorum", "client_checks.py", "if len(voters) < config.quorum:", "if False:"),
    Mutant(
        "votes are signed",
        "client_checks.py",
        "verify(config.cohort[voter].client, statement, signature):",
        "verify and False:",
    ),
    Mutant(
        "number of signatures",
        "client_checks.py",
        "if len(quorum.signatures) != SIGNATURE_BYTES * len(voters):",
        "if False:",
    ),
    Mutant("vote covers U2", "transcript.py", "_joined(sharers), _joined(survivors)", "_joined(survivors)"),
    Mutant("vote covers U3", "transcript.py", "_joined(sharers), _joined(survivors)", "_joined(sharers)"),
    Mutant("domain tags", "primitives.py", "(label.encode(), *parts)", "(b'', *parts)"),
    # the client's own states
    Mutant(
        "order of exchanges",
        "client_session.py",
        "if exchange is None or exchange.message is not kind:",
        "if exchange is None:",
    ),
    Mutant("state after an exchange", "client_session.py", "if type(after) is not exchange.after:", "if False:"),
    Mutant(
        "reveals once",
        "client_session.py",
        "        self._move(after)\n",
        "        if type(after) is not Ended:\n            self._move(after)\n",
    ),
    Mutant(
        "one share an owner, of the right kind",
        "client_session.py",
        "(of_self if owner in state.survivors else of_mask)",
        "of_self",
    ),
    Mutant("secrets wiped", "client_session.py", "                secret.wipe()", "                pass"),
    Mutant("self mask keyed by b", "masking.py", "derive(seed, salt, ", "derive(bytes(32), salt, "),
    Mutant(
        "pairwise mask keyed by the pair's secret",
        "masking.py",
        "derive(shared, salt, ",
        "derive(bytes(32), salt, ",
    ),
    Mutant(
        "mask keys bound to the round", "transcript.py", "self.salt = self.digest + config_digest", 'self.salt = b""'
    ),
    Mutant(
        "client: messages of one round",
        "client_session.py",
        'if agreed and getattr(message, "config", None) != agreed[1]:',
        "if False:",
    ),
    # checks of bytes on both sides
    Mutant("size before reading", "exchanged.py", "if len(data) > limit:", "if False:"),
    Mutant("one byte form", "exchanged.py", "if encode(message) != data:", "if False:"),
    Mutant("field elements", "shamir.py", "if len(data) != ELEMENT_BYTES or element >= PRIME:", "if False:"),
    # the server's checks of its clients
    Mutant(
        "server: asked at all",
        "server_session.py",
        "if exchange is None or index is None or index not in self._asked:",
        "if exchange is None or index is None:",
    ),
    Mutant("server: answered once", "server_session.py", "if index in self._answered:", "if False:"),
    Mutant(
        "server: messages of one round",
        "server_session.py",
        'if getattr(message, "config", None) != self._digest:',
        "if False:",
    ),
    Mutant(
        "server: signatures over keys",
        "server_session.py",
        'statement, message.signature):\n            return "its keys',
        'statement, message.signature) and False:\n            return "its keys',
    ),
    Mutant("server: keys unique", "server_session.py", "if len(keys) < 2 or keys & self._keys_in_use:", "if False:"),
    Mutant("server: keys of small order", "server_session.py", "if any(is_weak(key) for key in keys):", "if False:"),
    Mutant(
        "server: number of encrypted shares",
        "server_session.py",
        "if len(message.encrypted_shares) != ENCRYPTED_SHARE_BYTES * len(receivers):",
        "if False:",
    ),
    Mutant("server: number of segments", "server_session.py", "if len(message.segments) != len(indices):", "if False:"),
    Mutant(
        "server: size of segments", "server_session.py", "            if len(data) != size:", "            if False:"
    ),
    Mutant(
        "server: votes are signed",
        "server_session.py",
        'message.signature):\n            return "its vote',
        'message.signature) and False:\n            return "its vote',
    ),
    Mutant(
        "server: number of shares",
        "server_session.py",
        "if len(message.shares) != shamir.ELEMENT_BYTES * len(owners):",
        "if False:",
    ),
    Mutant(
        "server: recovered secrets checked",
        "server_session.py",
        "            if not self._is_seed_of(owner, seed):",
        "            if False:",
    ),
    Mutant(
        "server: σ against the mask key",
        "server_session.py",
        "return mask_agreement(seed).public == self._agreed.keys[owner].mask_key",
        "return True",
    ),
    Mutant(
        "server: b against its commitment",
        "server_session.py",
        "return commitment(seed, self._digest, owner) == self._commitments[owner]",
        "return True",
    ),
    Mutant("server: enough clients", "server_session.py", "        if missing:\n", "        if False:\n"),
    Mutant("server: enough votes", "server_session.py", "if len(self._votes) < self.config.quorum:", "if False:"),
    Mutant("server: enough share holders", "server_session.py", "if left < self.config.threshold:", "if False:"),
    # checks that bind a secure round to its training
    Mutant(
        "round: only what can be masked", "secure_rounds.py", 'if request.uplink.form != "ring":', "if False:", CLIENT
    ),
    Mutant(
        "round: no memory in a sum",
        "uplink.py",
        'if uplink.form == "ring" and uplink.error_feedback:',
        "if False:",
        CODEC,
    ),
    Mutant("round: number", "secure_rounds.py", '"round": (config.round, request.round),', "", CLIENT),
    Mutant("round: work", "secure_rounds.py", '"work and codec": (config.context, terms_digest(request)),', "", CLIENT),
    Mutant(
        "round: segments",
        "secure_rounds.py",
        '"segments": (config.segments, masked_segments(terms, tiers)),',
        "",
        CLIENT,
    ),
    Mutant(
        "round: tier",
        "secure_rounds.py",
        '"tier": ({member.tier for member in config.cohort if member.client == client}, {tier}),',
        "",
        CLIENT,
    ),
    Mutant(
        "round: ring's room", "secure_rounds.py", "if len(config.cohort) > request.uplink.n_max:", "if False:", CLIENT
    ),
    Mutant("terms: base", "round_terms.py", "if base != terms.base:", "if False:", MANIFEST, suites=TERMS),
    Mutant(
        "terms: rounds",
        "round_terms.py",
        "if not 1 <= number <= job.federation.rounds:",
        "if False:",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: work",
        "round_terms.py",
        '"local work": (_rounded(request.work), _rounded(work)),',
        "",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant("terms: seed", "round_terms.py", '"seed": (request.job_seed, terms.seed),', "", MANIFEST, suites=TERMS),
    Mutant("terms: form", "round_terms.py", '"form": (uplink.form, form),', "", MANIFEST, suites=TERMS),
    Mutant("terms: bits", "round_terms.py", '"bits": (uplink.bits, compression.bits),', "", MANIFEST, suites=TERMS),
    Mutant(
        "terms: density",
        "round_terms.py",
        '"density": (uplink.density, compression.density),',
        "",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: feedback",
        "round_terms.py",
        '"error feedback": (uplink.error_feedback, compression.error_feedback),',
        "",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: rotation",
        "round_terms.py",
        '"rotation": (uplink.rotation, compression.rotation),',
        "",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: clips",
        "round_terms.py",
        "if not math.isclose(clip, due, rel_tol=_ROUNDING):",
        "if False:",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: number of clips",
        "round_terms.py",
        "if len(uplink.clips) != len(letters):",
        "if False:",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: tiers",
        "round_terms.py",
        "if not set(uplink.tiers) <= set(job.tiers):",
        "if False:",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: basis",
        "round_terms.py",
        "if request.rebasing and not (compression.error_feedback and job.federation.rebalance_every):",
        "if False:",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: evaluation",
        "round_terms.py",
        "if (request.job_seed, request.holdout) != (terms.seed, job.data.holdout)",
        "if False",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant(
        "terms: device checks",
        "device.py",
        "check_training(terms, trainer.layout, request)",
        "pass",
        CLIENT,
        suites=TERMS,
    ),
    Mutant(
        "manifest: signature",
        "signed.py",
        ".verify(self.signature, _statement(self.kind, self.content))",
        "",
        MANIFEST,
        suites=TERMS,
    ),
    Mutant("manifest: kind", "signed.py", 'if value["kind"] != kind or', "if", MANIFEST, suites=TERMS),
    Mutant("manifest: kind is signed", "signed.py", "kind.encode(), json", 'b"", json', MANIFEST, suites=TERMS),
    Mutant(
        "manifest: expiry", "job_manifest.py", "if not now < manifest.expires:", "if False:", MANIFEST, suites=TERMS
    ),
    Mutant("manifest: size", "signed.py", "if len(data) > limit:", "if False:", MANIFEST, suites=TERMS),
    Mutant("log: signature", "fleet_log.py", ".checked(fleet.key)", ".content", MANIFEST, suites=JOINING),
    Mutant(
        "log: order",
        "fleet_log.py",
        'if (content["number"], content["previous"]) != (fleet.number + 1, fleet.digest):',
        "if False:",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "log: older", "fleet_log.py", "if held.startswith(log) and held != log:", "if False:", MANIFEST, suites=JOINING
    ),
    Mutant("log: another", "fleet_log.py", "if not log.startswith(held):", "if False:", MANIFEST, suites=JOINING),
    Mutant("log: expiry", "fleet_log.py", "if not now < self.expires:", "if False:", MANIFEST, suites=JOINING),
    Mutant(
        "log: cut off",
        "fleet_log.py",
        "if log and not log.endswith(",
        "if log and log.endswith(b'?' + ",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "log: names", "fleet_log.py", "if check_name(name) in devices:", "if name in devices:", MANIFEST, suites=JOINING
    ),
    Mutant(
        "log: name taken",
        "fleet_log.py",
        "if check_name(name) in devices:",
        "if not check_name(name):",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "log: one key twice",
        "fleet_log.py",
        "if len({keys.node for keys in devices.values()}) < len(devices):",
        "if False:",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant("log: identities", "fleet_log.py", "_ = after.roster", "_ = after.number", MANIFEST, suites=JOINING),
    Mutant("joining: possession", "joining.py", ").verify(", ").public_bytes_raw() or (", MANIFEST, suites=JOINING),
    Mutant("terms: digest has the settings", "job_terms.py", '"settings": chosen, ', "", MANIFEST, suites=TERMS),
    Mutant("terms: digest has the base", "job_terms.py", ', "base": base}', "}", MANIFEST, suites=TERMS),
    Mutant("terms: seed has the digest", "job_terms.py", '"job", self.digest)', '"job")', MANIFEST, suites=TERMS),
    Mutant("round: job", "secure_rounds.py", '"job": (config.job, self._device.job or config.job),', "", CLIENT),
    Mutant("round: open first", "secure_rounds.py", "if client not in self._rounds:", "if False:", CLIENT),
    Mutant(
        "round: aborts change nothing",
        "round.py",
        "        except (RoundAbortedError, JobError) as error:\n            self._aborted = str(error)",
        "        except (RoundAbortedError, JobError):\n            pass",
        STRATEGIES,
    ),
    # groups, and the tracing of failed sums
    Mutant(
        "groups: a lost one has no survivors",
        "round.py",
        "            self._lose(outcome)",
        "            pass",
        STRATEGIES,
    ),
    Mutant(
        "tracing: silent devices are no suspects",
        "secure_sum.py",
        "named = type(error) is RoundAbortedError and not self._refused",
        "named = False",
        STRATEGIES,
    ),
    Mutant(
        "tracing: refused shares make suspects",
        "secure_sum.py",
        "named = type(error) is RoundAbortedError and not self._refused",
        "named = type(error) is RoundAbortedError",
        STRATEGIES,
    ),
    Mutant(
        "tracing: who is found is left out",
        "requests.py",
        "(*state.suspicion.excluded, *state.evidence.condemned)",
        "state.evidence.condemned",
        STRATEGIES,
    ),
    # the server's checks of a device's request
    Mutant(
        "request: lately",
        "signed_requests.py",
        "not -MAX_AHEAD_SECONDS < age < MAX_AGE_SECONDS",
        "False",
        PROTOCOL,
        suites=REQUESTS,
    ),
    # the server's checks of what a reply has it store
    Mutant("reply: bytes", "mailboxes.py", "size > self.payload_bytes", "False", FLOWER, suites=GUARD),
    Mutant("reply: one for a message", "mailboxes.py", "self.answered != digest", "False", FLOWER, suites=GUARD),
    Mutant("reply: what is kept", "mailboxes.py", "while len(letters) > _KEPT:", "while False:", FLOWER, suites=GUARD),
    Mutant(
        "reply: pieces within the announced size",
        "mailboxes.py",
        "self.received + len(content) > self.size",
        "False",
        FLOWER,
        suites=GUARD,
    ),
    Mutant(
        "reply: pieces in their order", "mailboxes.py", "if offset != self.received:", "if False:", FLOWER, suites=GUARD
    ),
    Mutant(
        "reply: announced digest", "mailboxes.py", "self._hash.digest() != self.digest", "False", FLOWER, suites=GUARD
    ),
    Mutant("reply: of a message that was taken", "device_endpoints.py", "asked is None or", "", FLOWER, suites=GUARD),
    # a device's checks of what a server sends
    Mutant(
        "link: size of a message",
        "fleet_link.py",
        "sum(task.sizes) > self._message_bytes",
        "False",
        LIVE_CLIENT,
        suites=LIAR,
    ),
    Mutant(
        "link: size of a piece",
        "fleet_link.py",
        "min(MAX_PIECE_BYTES, size - len(content))",
        "(1 << 30)",
        LIVE_CLIENT,
        suites=LIAR,
    ),
    Mutant(
        "link: parts of a message",
        "fleet_link.py",
        "len(parts) != parts_of(task.action)",
        "False",
        LIVE_CLIENT,
        suites=LIAR,
    ),
    Mutant(
        "link: the last answer of a device that leaves",
        "mailboxes.py",
        "letter.answered and not letter.collected",
        "False",
        FLOWER,
        suites=CONTRACT,
    ),
    Mutant("link: progress of an upload", "fleet_link.py", "there <= before", "False", LIVE_CLIENT, suites=LIAR),
    Mutant(
        "link: size of an answer",
        "signed_http.py",
        "received > limit",
        "False",
        LIVE_CLIENT,
        suites=LIAR,
    ),
    Mutant(
        "link: no compression",
        "signed_http.py",
        '!= "identity":',
        "== 0:",
        LIVE_CLIENT,
        suites=LIAR,
    ),
    # a device's checks of a model that it installs
    Mutant("release: owner's signature", "model_release.py", ".checked(fleet_key)", "", MANIFEST, suites=RELEASES),
    Mutant(
        "release: expiry", "model_release.py", "if not now < release.expires:", "if False:", MANIFEST, suites=RELEASES
    ),
    Mutant(
        "release: digest of the export",
        "model_pull.py",
        "release.models.get(offer.format) != digest",
        "False",
        PULLS,
        suites=RELEASES,
    ),
    Mutant(
        "release: none from before", "model_pull.py", "versions.check_newer(release)", "pass", PULLS, suites=RELEASES
    ),
    Mutant(
        "release: one content for a number",
        "model_versions.py",
        "release.number > last.number",
        "last.number <= release.number",
        PULLS,
        suites=RELEASES,
    ),
    Mutant(
        "release: remembered before it is used",
        "model_versions.py",
        "write_private(self.folder / RELEASE, release.data)",
        "self._point(CURRENT, version)",
        PULLS,
        suites=RELEASES,
    ),
    Mutant("release: by the key in force", "device_home.py", "[1].key", "[0].key", LIVE_CLIENT, suites=RELEASES),
    Mutant("release: fresh log", "device_home.py", "after.check_fresh(now)", "pass", LIVE_CLIENT, suites=RELEASES),
    # group testing
    Mutant(
        "group testing: who is condemned is left out",
        "requests.py",
        "(*state.suspicion.excluded, *state.evidence.condemned)",
        "state.suspicion.excluded",
        STRATEGIES,
    ),
    Mutant(
        "group testing: evidence passes to the next round",
        "round.py",
        "evidence=aggregate.evidence or self.state.evidence",
        "evidence=self.state.evidence",
        STRATEGIES,
    ),
    Mutant(
        "group testing: no more condemned than may be hostile",
        "evidence.py",
        "key=lambda name: -distance[name])[:most]",
        "key=lambda name: -distance[name])",
        f"{STRATEGIES}/aggregation",
    ),
    Mutant(
        "group testing: nobody condemned before enough tests",
        "evidence.py",
        "tested[name] >= FEWEST_TESTS",
        "tested[name]",
        f"{STRATEGIES}/aggregation",
    ),
    Mutant(
        "group testing: the side of the few is hostile",
        "evidence.py",
        "    if np.sum((values - np.mean(values)) ** 3) < 0:",
        "    if False:",
        f"{STRATEGIES}/aggregation",
    ),
    Mutant(
        "group testing: poisoned groups are no part of the mean",
        "group_testing.py",
        "            groups = self._staying(groups, evidence)\n",
        "",
        f"{STRATEGIES}/aggregation",
    ),
    Mutant(
        "group testing: groups that hardly stand apart stay",
        "group_testing.py",
        "evidence.tests[-1].scores) <= APART:",
        "evidence.tests[-1].scores) < 0:",
        f"{STRATEGIES}/aggregation",
    ),
    Mutant(
        "group testing: groups of doubted clients do not",
        "group_testing.py",
        "[group for group in groups if not set(evidence.doubted) & set(group.clients)] or groups",
        "groups",
        f"{STRATEGIES}/aggregation",
    ),
    # joining: the code that people compare, and what a server takes from machines that are no devices yet
    Mutant("joining: code of 80 bits", "joining.py", "_GROUP = 16, 4", "_GROUP = 12, 4", MANIFEST, suites=JOINING),
    Mutant(
        "joining: code covers the name",
        "joining.py",
        '"join request", self.name.encode(), ',
        '"join request", ',
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "joining: code covers the identity",
        "joining.py",
        "self.name.encode(), self.keys.identity, ",
        "self.name.encode(), ",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "joining: code covers the request key",
        "joining.py",
        "self.keys.identity, self.keys.node)",
        "self.keys.identity)",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "joining: size of a request",
        "joining.py",
        "if len(data) > MAX_REQUEST_BYTES:",
        "if False:",
        MANIFEST,
        suites=DECODERS,
    ),
    Mutant(
        "joining: name of a device",
        "enrolled_devices.py",
        "if request.name in Devices.load(home).fleet.devices:",
        "if False:",
        LIVE_SERVER,
        suites=JOINING,
    ),
    Mutant("joining: requests that wait", "enrolled_devices.py", ">= MAX_REQUESTS", "< 0", LIVE_SERVER, suites=JOINING),
    Mutant(
        "joining: log that a server takes",
        "enrolled_devices.py",
        "extended(Devices.load(home).log, log, home.fleet_key)",
        "replay(log, home.fleet_key)",
        LIVE_SERVER,
        suites=JOINING,
    ),
    Mutant(
        "invitation: authority",
        "joining.py",
        "x509.load_pem_x509_certificate(found.authority.encode())",
        "_ = x509",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "invitation: fleet's key",
        "joining.py",
        "            Ed25519PublicKey.from_public_bytes(found.fleet_key)\n",
        "",
        MANIFEST,
        suites=JOINING,
    ),
    Mutant(
        "invitation: address",
        "joining.py",
        'cls(check_address(content["server"]), ',
        'cls(content["server"], ',
        MANIFEST,
        suites=JOINING,
    ),
    # decoders: errors that only damaged values brought about
    Mutant(
        "decoders: endless number",
        "fleet_log.py",
        "ValueError, OverflowError, ",
        "ValueError, ",
        MANIFEST,
        suites=DECODERS,
    ),
    Mutant(
        "decoders: text that is none",
        "job_terms.py",
        "TypeError, ValueError, FedtuneError",
        "TypeError, FedtuneError",
        MANIFEST,
        suites=DECODERS,
    ),
    Mutant(
        "decoders: damaged checkpoint",
        "run_directory.py",
        "TypeError, AttributeError, ",
        "TypeError, ",
        SERVER,
        suites=DECODERS,
    ),
    Mutant(
        "decoders: cohort of a job",
        "graph.py",
        "if cohort > MAX_COHORT:",
        "if False:",
        suites=("tests/unit/secagg/test_graph.py",),
    ),
    # the two servers, before they know who asks
    Mutant("guard: calls of devices", "guard.py", 'scope["path"] not in DEVICE_CALLS', "False", FLOWER, suites=GUARD),
    Mutant(
        "guard: control key",
        "guard.py",
        "return None if hmac.compare_digest(shown, self._control_key) else _NOT_FOUND",
        "return None",
        FLOWER,
        suites=GUARD,
    ),
    Mutant(
        "guard: length before a body",
        "guard.py",
        'if len(length) > 10 or int(length) > DEVICE_CALLS[scope["path"]]:',
        "if False:",
        FLOWER,
        suites=GUARD,
    ),
    Mutant(
        "guard: enrolled before a body",
        "guard.py",
        'return None if headers.get(KEY_HEADER.encode(), b"") in self._enrolled else _UNKNOWN',
        "return None",
        FLOWER,
        suites=GUARD,
    ),
    Mutant(
        "guard: signature over the body",
        "guard.py",
        'body is None or not is_signed(dict(scope["headers"]), scope["path"], body, time.time())',
        "body is None",
        FLOWER,
        suites=GUARD,
    ),
    Mutant(
        "request: signature covers the path",
        "signed_requests.py",
        "path.encode(), timestamp, body)",
        "timestamp, body)",
        PROTOCOL,
        suites=REQUESTS,
    ),
    Mutant(
        "request: signature covers the time",
        "signed_requests.py",
        "path.encode(), timestamp, body)",
        "path.encode(), body)",
        PROTOCOL,
        suites=REQUESTS,
    ),
    Mutant(
        "request: signature covers the body",
        "signed_requests.py",
        "path.encode(), timestamp, body)",
        "path.encode(), timestamp)",
        PROTOCOL,
        suites=REQUESTS,
    ),
    Mutant(
        "connections: silent ones of an address",
        "connections.py",
        "if len(beside) > self.patience.silent:",
        "if False:",
        HOST,
        suites=CONNECTIONS,
    ),
    Mutant(
        "connections: time for the first byte",
        "connections.py",
        "        self._limit(self.patience.silent_seconds)\n",
        "",
        HOST,
        suites=CONNECTIONS,
    ),
    Mutant(
        "connections: time for the head",
        "connections.py",
        "            self._limit(self.patience.head_seconds)\n",
        "            pass\n",
        HOST,
        suites=CONNECTIONS,
    ),
    Mutant(
        "connections: network of an address",
        "connections.py",
        '    if ":" not in host:\n',
        "    if host:\n",
        HOST,
        suites=CONNECTIONS,
    ),
    Mutant("serve: host", "http_api.py", '("host", 421, "http://"), ', "", PULLS, suites=SERVE),
    Mutant("serve: origin", "http_api.py", ', ("origin", 403, ""))', ",)", PULLS, suites=SERVE),
    Mutant("serve: one host", "http_api.py", '(name == "host" and len(values) != 1) or ', "", PULLS, suites=SERVE),
    # pulls
    Mutant("pull: nothing that unpacks", "signed_http.py", '!= "identity":', "== 0:", LIVE_CLIENT, suites=PULL),
    Mutant("pull: no more than was asked for", "signed_http.py", "received > limit", "False", LIVE_CLIENT, suites=PULL),
    Mutant("pull: a pack is no model", "model_pull.py", "manifest.kind != kind or ", "", PULLS, suites=PULL),
    Mutant(
        "pull: packs by their names",
        "model_registry.py",
        " if not one.is_pack or one.name == release.name",
        "",
        LIVE_SERVER,
        suites=PULL,
    ),
    # jobs that a server takes
    Mutant("jobs: the same terms twice", "job_queue.py", "if same is not None:", "if False:", LIVE_SERVER, suites=JOBS),
    Mutant("jobs: one name twice", "job_queue.py", "if name in self._names():", "if False:", LIVE_SERVER, suites=JOBS),
    Mutant(
        "jobs: signed again under its own name", "job_queue.py", " and same.name == name", "", LIVE_SERVER, suites=JOBS
    ),
    # checks of files on a device
    Mutant("one key for each client", "identity.py", "if key in seen:", "if False:"),
    Mutant("identity private to its owner", "identity.py", "if path.stat().st_mode & 0o077:", "if False:"),
    Mutant("spoilt round log", "round_log.py", "type=dict[str, Served]", "type=dict"),
    Mutant("full round log", "round_log.py", "if grows and len(content)", "if False and len(content)"),
    Mutant("round log outlives leave", "device_home.py", "        if each == kept:", "        if False:", LIVE_CLIENT),
    Mutant("round log of each fleet", "device_home.py", "{self.config.fleet_key}.json", "log.json", LIVE_CLIENT),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the mutants whose check contains this")
    parser.add_argument("--dry-run", action="store_true", help="only look whether every mutant still applies")
    options = parser.parse_args()
    if lost := inapplicable():
        raise SystemExit("\n".join(lost))
    if options.dry_run:
        return 0
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.check]
    for suites in {mutant.suites: None for mutant in chosen}:
        if broken := first_failure(replace(UNCHANGED, suites=suites)):
            raise SystemExit(f"the tests fail without any mutant: {broken}")
    print("| check removed | caught by |\n|---|---|")
    missed = 0
    for mutant in chosen:
        caught = first_failure(mutant)
        missed += caught is None
        print(f"| {mutant.check} | {caught or '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} removed checks are noticed.")
    return 1 if missed else 0


def inapplicable() -> list[str]:
    """Returns the mutants whose text no longer occurs in the sources."""
    lost = []
    for mutant in MUTANTS:
        count = (ROOT / mutant.package / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            lost.append(f"{mutant.check}: {mutant.old!r} occurs {count} times in {mutant.file}")
    return lost


def first_failure(mutant: Mutant) -> str | None:
    """Returns the first test that fails on the mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / name for name in ("core", "strategies", "client", "server")]
        for root in roots:
            shutil.copytree(ROOT / root.name, root, ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder) / mutant.package / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *mutant.suites, "-x", "-q", "--no-header", "-p", "no:cacheprovider"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, roots)),
                "HYPOTHESIS_STORAGE_DIRECTORY": folder,
            },
            capture_output=True,
            text=True,
            check=False,
        )
    if failure := re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", run.stdout, flags=re.MULTILINE):
        return failure[1].replace("_", " ").removeprefix("test ")
    if run.returncode:
        raise SystemExit(f"{mutant.check}: the tests did not run\n{run.stdout}{run.stderr}")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
