"""A client's checks of the server's messages before it answers; each raises `ServerFaultError` if a message fails it.

No check changes any state: a client that has refused a message may still receive a valid one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedtune.core.errors import PolicyError, ServerFaultError, UpdateError
from fedtune.core.privacy.guarantee import OWNER_DELTA, epsilon_of
from fedtune.core.secagg import shamir
from fedtune.core.secagg.config import Policy, config_problems, policy_problems, segments_of, shortfall
from fedtune.core.secagg.exchanged import KeyEntry, KeyList, Quorum, RoundConfig, increasing, pieces
from fedtune.core.secagg.identity import Roster
from fedtune.core.secagg.masking import Words, word_type
from fedtune.core.secagg.primitives import SIGNATURE_BYTES, is_weak, unseal
from fedtune.core.secagg.round_log import RoundMark, Served
from fedtune.core.secagg.transcript import Transcript, advertisement_statement
from fedtune.core.text import counted

_ROUNDING = 1 + 1e-9  # of a budget that is spent in equal parts
REFUSED_SHARES = "encrypted shares: the share from"


def refuses_shares(reason: str) -> bool:
    """Returns whether a client's reason for no answer is that another client's shares are bad, or so it says."""
    return REFUSED_SHARES in reason


def check_config(config: RoundConfig, policy: Policy, roster: Roster) -> None:
    """Checks that a configuration is consistent in itself, with the client's policy and with its roster."""
    if found := config_problems(config):
        raise ServerFaultError("configuration: " + "; ".join(found))
    if found := policy_problems(config, policy):
        raise PolicyError("configuration: " + "; ".join(found))
    unknown = [member.client for member in config.cohort if member.client not in roster.keys]
    if unknown:
        raise ServerFaultError(f"configuration: {unknown[0]} is not in this client's roster")


def own_index(config: RoundConfig, client: str, public: bytes, roster: Roster) -> int:
    """Returns this client's index in the cohort.

    Args:
        public: identity key of the client, which the roster must list.
    """
    invited = [index for index, member in enumerate(config.cohort) if member.client == client]
    if not invited or roster.keys[client] != public:
        raise ServerFaultError(f"configuration: {client} is not invited, or pinned under another key")
    return invited[0]


def check_holdings(config: RoundConfig, base_digest: str, adapter_digest: str) -> None:
    """Checks that the round trains the base model and the adapter that this client holds."""
    asked, loaded = (config.base_digest, config.adapter_digest), (base_digest, adapter_digest)
    for what, theirs, ours in zip(("base", "adapter"), asked, loaded, strict=True):
        if theirs != ours:
            raise ServerFaultError(f"configuration: {what} {theirs[:12]}, this client holds {ours[:12]}")


def check_unserved(mark: RoundMark, served: Served, policy: Policy) -> None:
    """Checks that an attempt is later than the last one that this client served, and not of one sum too many."""
    if mark <= served.last:
        raise ServerFaultError(f"configuration: round {mark} is not after {served.last}, the last one served")
    if policy.max_sums is not None and served.sums >= policy.max_sums:
        raise PolicyError(
            f"configuration: this client was in {served.sums} sums of the job and joins {policy.max_sums}"
        )


def check_budget(spent: float, policy: Policy) -> None:
    """Checks that one more sum is within the budget of differential privacy that the client has for all jobs.

    Args:
        spent: ρ of all sums so far.
    """
    if policy.most_rho is None:
        return
    if not policy.rho:
        raise PolicyError("configuration: the job has no differential privacy, and this client a budget of it")
    if spent + policy.rho > policy.most_rho * _ROUNDING:
        now, then, most = (epsilon_of(rho, OWNER_DELTA) for rho in (spent, spent + policy.rho, policy.most_rho))
        raise PolicyError(
            f"configuration: the owner's privacy budget (--max-epsilon) is {most:.3g}; {now:.3g} of it is spent, and a "
            f"sum of this job would make it {then:.3g}"
        )


def check_apart(survivors: frozenset[str], earlier: Iterable[Iterable[str]], policy: Policy) -> None:
    """Checks that no other sum of the job which this client has voted for is that of nearly the same clients.

    The difference of two such sums would be about the few clients alone that are in one of them.
    """
    for others in earlier:
        apart = len(survivors.symmetric_difference(others))
        if 0 < apart < policy.min_difference:
            raise PolicyError(
                f"survivors: {counted(apart, 'client')} apart from those of an earlier sum of this job; different sets "
                f"must be at least {policy.min_difference} apart"
            )


def check_keys(config: RoundConfig, digest: bytes, roster: Roster, own: KeyEntry, keys: KeyList) -> None:
    """Checks that keys are distinct, strong and signed by enough clients, and that this client's own are among them.

    Args:
        digest: H(cfg).
    """
    listed = [entry.client_index for entry in keys.entries]
    advertisers = index_set(listed, range(len(config.cohort)), own.client_index, "keys")
    check_enough(config, advertisers, "advertisers")
    if own not in keys.entries:
        raise ServerFaultError("keys: this client's own entry is not what it advertised")
    if len({key for entry in keys.entries for key in (entry.share_key, entry.mask_key)}) != 2 * len(listed):
        raise ServerFaultError("keys: a key occurs twice")
    for entry in keys.entries:
        client = config.cohort[entry.client_index].client
        if is_weak(entry.share_key) or is_weak(entry.mask_key):
            raise ServerFaultError(f"keys: a key of {client} is weak")
        statement = advertisement_statement(digest, entry.client_index, entry.share_key, entry.mask_key)
        if not roster.verify(client, statement, entry.signature):
            raise ServerFaultError(f"keys: {client} did not sign the keys listed for it")


def opened_pair(
    transcript: Transcript, key: bytes, sender: int, receiver: int, encrypted: bytes
) -> tuple[bytes, bytes]:
    """Decrypts the sender's shares of b and of σ, each 32 bytes, for the receiver."""
    opened = unseal(key, encrypted, transcript.associated_data(sender, receiver))
    client = transcript.config.cohort[sender].client
    if opened is None:
        raise ServerFaultError(f"{REFUSED_SHARES} {client} was altered in transit or has another sender", client)
    of_self, of_mask = pieces(opened, shamir.ELEMENT_BYTES)
    try:
        shamir.to_element(of_self), shamir.to_element(of_mask)
    except ValueError:
        raise ServerFaultError(f"{REFUSED_SHARES} {client} does not hold shares", client) from None
    return of_self, of_mask


def check_votes(
    transcript: Transcript, roster: Roster, sharers: frozenset[int], survivors: frozenset[int], quorum: Quorum
) -> None:
    """Checks that a quorum of survivors has signed these two sets, U2 and U3."""
    config = transcript.config
    voters = index_set(quorum.voters, survivors, None, "voters")
    if len(voters) < config.quorum:
        raise ServerFaultError(f"votes: {len(voters)}, expected at least {config.quorum}")
    if len(quorum.signatures) != SIGNATURE_BYTES * len(voters):
        raise ServerFaultError(f"votes: {len(quorum.signatures)} bytes of signatures for {len(voters)} voters")
    statement = transcript.vote_statement(sharers, survivors)
    for voter, signature in zip(quorum.voters, pieces(quorum.signatures, SIGNATURE_BYTES), strict=True):
        if not roster.verify(config.cohort[voter].client, statement, signature):
            raise ServerFaultError(f"votes: {config.cohort[voter].client} did not sign what this client signed")


def index_set(listed: Sequence[int], within: Iterable[int], own: int | None, what: str) -> frozenset[int]:
    """Returns a list of client indices as a set, after checks.

    The list must be increasing, a part of the set before it, and contain this client where it must be in it.
    """
    found = frozenset(listed)
    if not increasing(listed):
        raise ServerFaultError(f"{what}: client indices must be strictly increasing")
    if not found <= frozenset(within):
        raise ServerFaultError(f"{what}: a client index is listed that cannot be there")
    if own is not None and own not in found:
        raise ServerFaultError(f"{what}: this client is not among them")
    return found


def check_enough(config: RoundConfig, present: Iterable[int], what: str) -> None:
    """Checks that these clients are enough to be summed, in total and in every tier."""
    missing = shortfall(config, present)
    if missing:
        raise ServerFaultError(f"{what}: {missing}")


def checked_update(config: RoundConfig, own: int, update: Mapping[str, Words]) -> dict[int, Words]:
    """Returns a copy of this client's update by segment index, in machine words to which masks can be added.

    Raises:
        UpdateError: the update does not fit the segments of the client's tier.
    """
    wanted = segments_of(config, own)
    names = {config.segments[segment].name for segment in wanted}
    if names != update.keys():
        raise UpdateError(f"update has segments {sorted(update)}, the round sums {sorted(names)}")
    words: dict[int, Words] = {}
    for index in wanted:
        segment = config.segments[index]
        given = update[segment.name]
        if given.dtype.kind != "u" or given.shape != (segment.length,):
            got = f"{given.dtype} of shape {given.shape}"
            raise UpdateError(f"segment {segment.name}: expected {segment.length} unsigned words, got {got}")
        limit = (1 << segment.bits) - 1 if segment.limit is None else segment.limit
        if given.size and int(given.max()) > limit:
            raise UpdateError(f"segment {segment.name}: {int(given.max())} is above the limit of {limit}")
        words[index] = np.array(given, dtype=word_type(segment.bits))
    return words
