"""Attacks by the server on its clients: each is refused with a reason, and leaves the client's state unchanged.

Five honest clients, client-0 ... client-4, with n_min = 4 and t = q = 3, unless a test says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rehearsal import LENIENT, Rehearsal, enrol, plain_sum, random_updates

from fedtune.core.errors import PolicyError
from fedtune.core.secagg import (
    ClientFaultError,
    ClientSession,
    FileRoundLog,
    Identity,
    Member,
    Policy,
    Roster,
    RoundConfig,
    RoundMark,
    Segment,
    Served,
    ServerFaultError,
    Stage,
)
from fedtune.core.secagg.client_session import Ended
from fedtune.core.secagg.exchanged import (
    ENCRYPTED_SHARE_BYTES,
    Advertisement,
    Delivery,
    KeyEntry,
    KeyList,
    MaskedInput,
    Message,
    Quorum,
    Reveal,
    Survivors,
    Vote,
    decode,
    encode,
    pieces,
)
from fedtune.core.secagg.masking import unmask_sums, word_type
from fedtune.core.secagg.primitives import Agreement
from fedtune.core.secagg.shamir import Combiner, to_bytes, to_element
from fedtune.core.secagg.transcript import Transcript, advertisement_statement, config_digest

SEGMENTS = (Segment("v", 16, 16, 1000, (0,)),)
ANY_SIZE = 1 << 24


class Fixture:
    """An honest cohort up to one exchange, and the victim's next request for a test to tamper with."""

    def __init__(self, stage: Stage, clients: int = 5, gone: tuple[int, ...] = ()) -> None:
        self.rehearsal = Rehearsal.prepare([0] * clients, SEGMENTS)
        self.config = self.rehearsal.server.config
        self.updates = random_updates(self.config)
        silent = {Stage.MASK: {f"client-{index}" for index in gone}}
        self.requests = self.rehearsal.until(stage, self.updates, silent)
        self.victim = self.rehearsal.clients["client-0"]

    def read(self, kind: type[Any], client: str = "client-0") -> Any:
        """Returns the honest request to one client."""
        return decode(self.requests[client], kind, ANY_SIZE)

    def refuses(self, message: Message, reason: str) -> None:
        """Checks that the victim refuses a message, keeps its state, and that the round still gives the exact sum."""
        before, secrets = self.victim.state, list(self.victim.state.secrets())
        with pytest.raises(ServerFaultError, match=reason):
            self.rehearsal.answer("client-0", encode(message), self.updates)
        assert self.victim.state is before
        assert not any(secret.wiped for secret in secrets)
        requests = self.requests
        while requests:
            requests = self.rehearsal.exchange(requests, self.updates)
        result = self.rehearsal.server.result
        assert np.array_equal(result.sums["v"], plain_sum(self.updates, "v", result.survivors))


def changed(message: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(message, **fields)


# Exchange 0: configurations


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"minimum": 2, "quorum": 2, "threshold": 2}, "quorum 2 of 5"),
        ({"quorum": 2}, "quorum 2 of 5"),
        ({"threshold": 2}, "threshold 2 of 5"),
        ({"minimum": 2}, "minimum of 2"),
        ({"threshold": 6}, "threshold 6 is not in 1 to 5"),
        ({"degree": 2}, "needs the complete graph"),
        ({"degree": 5}, "degree 5 is not in 1 to 4"),
        ({"tier_minimums": (0,)}, "tier minimum of 0"),
        ({"segments": (Segment("v", 16, 12, 1000, (0,)),)}, "overflow 12 bits"),
        ({"segments": (Segment("v", 16, 16, 1000, (1,)),)}, "tiers must be"),
        ({"segments": SEGMENTS * 2}, "same name"),
        ({"adapter_digest": "2" * 64}, "adapter 2222"),
        ({"base_digest": "2" * 64}, "base 2222"),
        ({"cohort": tuple(Member(f"client-{i}", 0) for i in (0, 1, 1, 2, 3))}, "invited twice"),
        ({"cohort": (*(Member(f"client-{i}", 0) for i in range(4)), Member("sybil", 0))}, "sybil is not in"),
        ({"cohort": (*(Member(f"client-{i}", 0) for i in range(4)), Member("client-4", 1))}, "a tier is not below"),
    ],
)
def test_a_configuration_that_takes_less_care_or_contradicts_itself_is_refused(
    fields: dict[str, object], reason: str
) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    fixture.refuses(changed(fixture.config, **fields), reason)


def test_a_client_joins_as_many_sums_of_a_job_as_its_policy_says_also_after_a_restart(tmp_path: Path) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    policy, log = replace(LENIENT, max_sums=2), FileRoundLog(tmp_path / "rounds.json")
    advertise(fresh_session(fixture, policy=policy, log=log), fixture.config)  # in no sum until it is masked
    for number in (2, 3):
        log.record(fixture.config.job, log.of(fixture.config.job).masked(number))
    session = fresh_session(fixture, policy=policy, log=FileRoundLog(tmp_path / "rounds.json"))
    with pytest.raises(PolicyError, match="was in 2 sums of the job and joins 2"):
        advertise(session, changed(fixture.config, round=4))
    advertise(session, changed(fixture.config, round=4, job="another"))


def test_a_client_spends_no_more_privacy_than_its_budget_whatever_the_jobs_are_called(tmp_path: Path) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    policy, log = replace(LENIENT, rho=0.4, most_rho=1.2), FileRoundLog(tmp_path / "rounds.json")
    log.record("before", log.of("before").masked(1, 0.4).masked(2, 0.4))
    advertise(fresh_session(fixture, policy=policy, log=log), fixture.config)  # the third and last part
    log.record("another", log.of("another").masked(1, 0.4))
    session = fresh_session(fixture, policy=policy, log=FileRoundLog(tmp_path / "rounds.json"))
    with pytest.raises(PolicyError, match=r"is 8\.64; 8\.64 of it is spent, and a sum of this job would make it 10\.2"):
        advertise(session, changed(fixture.config, round=4))
    unprivate = fresh_session(fixture, policy=replace(policy, rho=0.0), log=FileRoundLog(tmp_path / "empty.json"))
    with pytest.raises(PolicyError, match="has no differential privacy, and this client a budget of it"):
        advertise(unprivate, fixture.config)


@pytest.mark.parametrize(("least", "refused"), [(0, False), (1, False), (2, True)])
def test_a_client_votes_for_no_sum_that_differs_by_too_few_from_an_earlier_one(
    tmp_path: Path, least: int, refused: bool
) -> None:
    """Their difference is about the one client that is in the first alone."""
    fixture = Fixture(Stage.VOTE, gone=(4,))
    fixture.victim.policy = replace(LENIENT, min_difference=least)
    fixture.victim.log = log = FileRoundLog(tmp_path / "rounds.json")
    everybody = {f"client-{index}" for index in range(5)}
    log.record("rehearsal", Served().voted(everybody, keep=True))
    if refused:
        before = fixture.victim.state
        with pytest.raises(PolicyError, match="survivors: 1 client apart"):
            fixture.victim.vote(fixture.requests["client-0"])
        assert fixture.victim.state is before
        assert log.of("rehearsal").survivors == (tuple(sorted(everybody)),)
    else:
        fixture.victim.vote(fixture.requests["client-0"])


def test_a_client_may_vote_for_the_same_clients_as_before_and_remembers_every_set(tmp_path: Path) -> None:
    fixture = Fixture(Stage.VOTE)
    fixture.victim.policy = replace(LENIENT, min_difference=3)
    fixture.victim.log = log = FileRoundLog(tmp_path / "rounds.json")
    survivors = tuple(f"client-{index}" for index in range(5))
    far = ("client-0", "other-1", "other-2")
    log.record("rehearsal", Served(survivors=(survivors, far)))
    fixture.victim.vote(fixture.requests["client-0"])
    assert log.of("rehearsal").survivors == (far, survivors)


def test_a_vote_is_in_the_log_before_it_leaves(tmp_path: Path) -> None:
    fixture = Fixture(Stage.VOTE)
    fixture.victim.log = FileRoundLog(tmp_path / "missing" / "rounds.json")
    with pytest.raises(OSError, match="missing"):
        fixture.victim.vote(fixture.requests["client-0"])


def test_a_configuration_below_the_clients_own_minimum_is_refused() -> None:
    fixture = Fixture(Stage.ADVERTISE)
    session = fresh_session(fixture, policy=Policy(0.1, min_survivors=5, min_tier_survivors=1))
    with pytest.raises(ServerFaultError, match="minimum of 4 survivors is below this client's 5"):
        advertise(session, fixture.config)


def test_a_tier_in_which_all_but_one_may_collude_is_refused() -> None:
    """Two of twenty may collude: in a tier of three with both of them, the third's words are the sum minus theirs."""
    segments = (Segment("v", 4, 16, 1000, (0,)), Segment("w", 4, 16, 1000, (1,)))
    config = changed(Rehearsal.prepare([0] * 17 + [1] * 3, segments).server.config, tier_minimums=(3, 3))
    identities, roster = enrol(member.client for member in config.cohort)
    rehearsal = Rehearsal.start(config, identities, roster, policy=Policy())
    with pytest.raises(ServerFaultError, match="a tier minimum of 3 survivors is below this client's 4"):
        rehearsal.run(random_updates(config))
    four = changed(config, cohort=(*config.cohort[:16], Member("client-16", 1), *config.cohort[17:]))
    four = changed(four, tier_minimums=(4, 4))
    assert set(Rehearsal.start(four, identities, roster, policy=Policy()).run(random_updates(four)).sums) == {"v", "w"}


def test_more_collusion_than_the_server_admits_needs_a_higher_threshold() -> None:
    fixture = Fixture(Stage.ADVERTISE, clients=10)
    session = fresh_session(fixture, policy=Policy(max_corrupt=0.4, min_survivors=2, min_tier_survivors=1))
    with pytest.raises(ServerFaultError, match="threshold 6 of 10 is below 8"):
        advertise(session, fixture.config)


@pytest.mark.parametrize("clients", [3, 5, 9])
def test_in_the_smallest_cohort_too_one_client_may_collude(clients: int) -> None:
    """A quorum that is a majority of all lets one client who votes twice open two sets of survivors."""
    plain = clients // 2 + 1
    config = Fixture(Stage.ADVERTISE, clients=clients).config
    assert config.quorum == config.threshold == (clients + 1) // 2 + 1 > plain
    for field, reason in (("quorum", "two survivor sets could both find a quorum"), ("threshold", "both shares")):
        Fixture(Stage.ADVERTISE, clients=clients).refuses(changed(config, **{field: plain}), reason)


def test_a_cohort_without_this_client_is_refused() -> None:
    fixture = Fixture(Stage.ADVERTISE, clients=6)
    others = changed(
        fixture.config, cohort=tuple(fixture.config.cohort[1:]), degree=4, threshold=4, quorum=4, minimum=4
    )
    fixture.refuses(others, "client-0 is not invited")


def test_a_roster_that_pins_another_key_for_this_client_is_refused() -> None:
    fixture = Fixture(Stage.ADVERTISE)
    session = fresh_session(fixture, identity=Identity.generate())
    with pytest.raises(ServerFaultError, match="pinned under another key"):
        advertise(session, fixture.config)


@pytest.mark.parametrize("mark", [RoundMark(1, 0), RoundMark(0, 9), RoundMark(1, 1)])
def test_a_round_that_was_served_or_is_older_is_refused_even_after_a_restart(tmp_path: Path, mark: RoundMark) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    log = tmp_path / "rounds.json"
    served = changed(fixture.config, round=1, attempt=1)
    advertise(fresh_session(fixture, log=FileRoundLog(log)), served)
    restarted = fresh_session(fixture, log=FileRoundLog(log))
    with pytest.raises(ServerFaultError, match="is not after"):
        advertise(restarted, changed(fixture.config, round=mark.round, attempt=mark.attempt, nonce=bytes(32)))
    advertise(restarted, changed(fixture.config, round=1, attempt=2))


def test_a_round_is_remembered_before_the_first_byte_is_answered(tmp_path: Path) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    unwritable = FileRoundLog(tmp_path / "missing" / "rounds.json")
    session = fresh_session(fixture, log=unwritable)
    with pytest.raises(OSError, match="missing"):
        advertise(session, fixture.config)


def test_an_update_that_was_masked_is_never_masked_a_second_time(tmp_path: Path) -> None:
    """Two sums with an update in common would show the difference of the others in them, which may be one client's."""
    fixture = Fixture(Stage.ADVERTISE)
    logs = {f"client-{i}": FileRoundLog(tmp_path / f"{i}.json") for i in range(5)}
    identities = {name: session.identity for name, session in fixture.rehearsal.clients.items()}
    Rehearsal.start(fixture.config, identities, fixture.victim.roster, logs).until(Stage.VOTE, fixture.updates)
    session = fresh_session(fixture, log=logs["client-0"])
    with pytest.raises(ServerFaultError, match="is not after"):
        advertise(session, changed(fixture.config, attempt=7, nonce=bytes(32)))
    advertise(session, changed(fixture.config, round=2, nonce=bytes(32)))


def test_a_round_that_shared_keys_but_masked_nothing_may_be_tried_again(tmp_path: Path) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    logs = {f"client-{i}": FileRoundLog(tmp_path / f"{i}.json") for i in range(5)}
    identities = {name: session.identity for name, session in fixture.rehearsal.clients.items()}
    Rehearsal.start(fixture.config, identities, fixture.victim.roster, logs).until(Stage.MASK, fixture.updates)
    advertise(fresh_session(fixture, log=logs["client-0"]), changed(fixture.config, attempt=7, nonce=bytes(32)))


def test_the_log_closes_a_round_before_the_masked_update_leaves(tmp_path: Path) -> None:
    fixture = Fixture(Stage.MASK)
    fixture.victim.log = FileRoundLog(tmp_path / "missing" / "rounds.json")
    with pytest.raises(OSError, match="missing"):
        fixture.victim.mask(fixture.requests["client-0"], fixture.updates["client-0"])


# Exchange 1: keys


def test_keys_swapped_between_two_clients_are_refused() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    a, b = keys.entries[1], keys.entries[2]
    swapped = changed(a, share_key=b.share_key), changed(b, share_key=a.share_key)
    fixture.refuses(changed(keys, entries=(keys.entries[0], *swapped, *keys.entries[3:])), "did not sign")


@pytest.mark.parametrize("field", ["share_key", "mask_key"])
def test_keys_of_the_servers_own_are_refused(field: str) -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    forged = changed(keys.entries[3], **{field: Agreement(b"\x01" * 32).public})
    fixture.refuses(changed(keys, entries=(*keys.entries[:3], forged, *keys.entries[4:])), "did not sign")


def test_keys_signed_by_somebody_else_are_refused() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    fixture.refuses(
        changed(keys, entries=(*keys.entries[:4], signed_entry(fixture, 4, Identity.generate()))),
        "client-4 did not sign",
    )


def test_keys_of_another_round_are_refused() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    earlier = msgspec.structs.replace(fixture.config, nonce=bytes(32))
    replayed = signed_entry(fixture, 4, fixture.rehearsal.clients["client-4"].identity, earlier)
    fixture.refuses(changed(keys, entries=(*keys.entries[:4], replayed)), "client-4 did not sign")


def test_one_clients_keys_listed_a_second_time_under_another_client_index_are_refused() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    fixture.refuses(
        changed(keys, entries=(*keys.entries[:4], changed(keys.entries[3], client_index=4))), "a key occurs twice"
    )


def test_two_keys_shared_by_two_clients_that_both_signed_are_refused() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    colluder = fixture.rehearsal.clients["client-4"].identity
    copied = signed_entry(fixture, 4, colluder, mask_key=keys.entries[3].mask_key)
    fixture.refuses(changed(keys, entries=(*keys.entries[:4], copied)), "a key occurs twice")


@pytest.mark.parametrize("field", ["share_key", "mask_key"])
@pytest.mark.parametrize("weak", [bytes(32), b"\x01" + bytes(31), (2**255 - 20).to_bytes(32, "little")])
def test_keys_of_small_order_are_refused(field: str, weak: bytes) -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    colluder = fixture.rehearsal.clients["client-4"].identity
    entry = signed_entry(fixture, 4, colluder, share_key=weak) if field == "share_key" else None
    entry = entry or signed_entry(fixture, 4, colluder, mask_key=weak)
    fixture.refuses(changed(keys, entries=(*keys.entries[:4], entry)), "is weak")


def test_an_own_entry_that_was_replaced_is_refused_even_with_a_good_signature() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    fixture.refuses(
        changed(keys, entries=(signed_entry(fixture, 0, fixture.victim.identity), *keys.entries[1:])), "own entry"
    )


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ((0, 1, 2), "3 clients, expected at least 4"),
        ((1, 2, 3, 4), "this client is not among them"),
        ((0, 1, 2, 2, 3), "strictly increasing"),
        ((1, 0, 2, 3), "strictly increasing"),
    ],
)
def test_a_key_list_that_is_too_short_or_out_of_order_is_refused(chosen: tuple[int, ...], reason: str) -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    fixture.refuses(changed(keys, entries=tuple(keys.entries[index] for index in chosen)), reason)


def test_a_client_index_that_was_not_invited_is_refused() -> None:
    fixture = Fixture(Stage.SHARE)
    keys = fixture.read(KeyList)
    fixture.refuses(
        changed(keys, entries=(*keys.entries[:4], changed(keys.entries[4], client_index=7))), "cannot be there"
    )


# Exchange 2: encrypted shares


@pytest.mark.parametrize("position", [0, 40, ENCRYPTED_SHARE_BYTES - 1])
def test_a_box_with_one_bit_changed_is_refused(position: int) -> None:
    fixture = Fixture(Stage.MASK)
    delivery = fixture.read(Delivery)
    encrypted_shares = bytearray(delivery.encrypted_shares)
    encrypted_shares[2 * ENCRYPTED_SHARE_BYTES + position] ^= 1
    fixture.refuses(changed(delivery, encrypted_shares=bytes(encrypted_shares)), "the share from client-3 was altered")


def test_encrypted_shares_routed_to_the_wrong_place_are_refused() -> None:
    fixture = Fixture(Stage.MASK)
    delivery = fixture.read(Delivery)
    first, second, *rest = pieces(delivery.encrypted_shares, ENCRYPTED_SHARE_BYTES)
    fixture.refuses(changed(delivery, encrypted_shares=b"".join([second, first, *rest])), "from client-1 was altered")


def test_a_box_for_another_receiver_is_refused() -> None:
    fixture = Fixture(Stage.MASK)
    delivery = fixture.read(Delivery)
    theirs = pieces(
        fixture.read(Delivery, "client-1").encrypted_shares, ENCRYPTED_SHARE_BYTES
    )  # from client-0, -2, -3, -4
    ours = pieces(delivery.encrypted_shares, ENCRYPTED_SHARE_BYTES)  # from client-1, -2, -3, -4
    fixture.refuses(
        changed(delivery, encrypted_shares=b"".join([ours[0], theirs[1], *ours[2:]])), "from client-2 was altered"
    )


def test_a_clients_own_box_sent_back_to_it_is_refused() -> None:
    fixture = Fixture(Stage.MASK)
    delivery = fixture.read(Delivery)
    own = pieces(fixture.read(Delivery, "client-1").encrypted_shares, ENCRYPTED_SHARE_BYTES)[
        0
    ]  # client-0's encrypted share for client-1
    fixture.refuses(
        changed(delivery, encrypted_shares=own + delivery.encrypted_shares[ENCRYPTED_SHARE_BYTES:]),
        "from client-1 was altered",
    )


def test_encrypted_shares_of_another_round_are_refused() -> None:
    fixture, earlier = Fixture(Stage.MASK), Fixture(Stage.MASK)
    fixture.refuses(
        changed(fixture.read(Delivery), encrypted_shares=earlier.read(Delivery).encrypted_shares), "was altered"
    )


@pytest.mark.parametrize(
    "size", [0, ENCRYPTED_SHARE_BYTES * 3, ENCRYPTED_SHARE_BYTES * 4 - 1, ENCRYPTED_SHARE_BYTES * 5]
)
def test_another_number_of_encrypted_shares_than_there_are_senders_is_refused(size: int) -> None:
    fixture = Fixture(Stage.MASK)
    fixture.refuses(changed(fixture.read(Delivery), encrypted_shares=bytes(size)), f"encrypted shares: {size} bytes")


@pytest.mark.parametrize(
    ("sharers", "reason"),
    [
        ((0, 1, 2), "3 clients, expected at least 4"),
        ((1, 2, 3, 4), "this client is not among them"),
        ((0, 1, 2, 3, 3), "strictly increasing"),
        ((0, 1, 2, 3, 4, 5), "cannot be there"),
    ],
)
def test_a_set_of_sharers_that_is_too_small_or_not_a_part_of_the_key_list_is_refused(
    sharers: tuple[int, ...], reason: str
) -> None:
    fixture = Fixture(Stage.MASK)
    encrypted_shares = fixture.read(Delivery).encrypted_shares[: ENCRYPTED_SHARE_BYTES * (len(sharers) - 1)]
    fixture.refuses(Delivery(config_digest(fixture.config), sharers, encrypted_shares), reason)


# Exchange 3: survivors


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        ((0, 1, 2), "3 clients, expected at least 4"),
        ((1, 2, 3, 4), "this client is not among them"),
        ((0, 1, 1, 2, 3), "strictly increasing"),
        ((0, 1, 2, 3, 5), "cannot be there"),
    ],
)
def test_a_set_of_survivors_that_is_too_small_or_not_a_part_of_the_sharers_is_refused(
    survivors: tuple[int, ...], reason: str
) -> None:
    fixture = Fixture(Stage.VOTE)
    fixture.refuses(Survivors(config_digest(fixture.config), survivors), reason)


def test_a_survivor_that_never_shared_is_refused() -> None:
    rehearsal = Rehearsal.prepare([0] * 6, SEGMENTS)
    updates = random_updates(rehearsal.server.config)
    rehearsal.until(Stage.VOTE, updates, {Stage.SHARE: {"client-5"}})
    with pytest.raises(ServerFaultError, match="cannot be there"):
        rehearsal.clients["client-0"].vote(encode(Survivors(config_digest(rehearsal.server.config), tuple(range(6)))))


def test_a_tier_with_too_few_survivors_is_refused_in_every_exchange() -> None:
    """Two of six clients are in tier 1, which requires both: without one of them the other would be alone."""
    segments = (Segment("v", 4, 16, 1000, (0,)), Segment("w", 4, 16, 1000, (1,)))
    config = changed(Rehearsal.prepare([0, 0, 0, 0, 1, 1], segments).server.config, tier_minimums=(1, 2))
    identities, roster = enrol(member.client for member in config.cohort)
    updates = random_updates(config)
    for stage, kind in ((Stage.SHARE, KeyList), (Stage.MASK, Delivery), (Stage.VOTE, Survivors)):
        rehearsal = Rehearsal.start(config, identities, roster)
        honest: Any = decode(rehearsal.until(stage, updates)["client-0"], kind, ANY_SIZE)
        without_last = {
            KeyList: lambda m: changed(m, entries=m.entries[:5]),
            Delivery: lambda m: changed(
                m, sharers=m.sharers[:5], encrypted_shares=m.encrypted_shares[: 4 * ENCRYPTED_SHARE_BYTES]
            ),
            Survivors: lambda m: changed(m, survivors=m.survivors[:5]),
        }
        with pytest.raises(ServerFaultError, match="1 client in tier 1, expected at least 2"):
            rehearsal.answer("client-0", encode(without_last[kind](honest)), updates)


def test_a_client_never_votes_for_a_second_set_of_survivors() -> None:
    fixture = Fixture(Stage.VOTE)
    fixture.victim.vote(fixture.requests["client-0"])
    for survivors in ((0, 1, 2, 3), (0, 1, 2, 3, 4)):
        with pytest.raises(ServerFaultError, match="out of order"):
            fixture.victim.vote(encode(Survivors(config_digest(fixture.config), survivors)))


# Exchange 4: votes


def test_fewer_votes_than_the_quorum_are_refused() -> None:
    fixture = Fixture(Stage.UNMASK)
    quorum = fixture.read(Quorum)
    fixture.refuses(changed(quorum, voters=quorum.voters[:2], signatures=quorum.signatures[:128]), "votes: 2, expected")


def test_one_vote_counted_twice_is_refused() -> None:
    fixture = Fixture(Stage.UNMASK)
    quorum = fixture.read(Quorum)
    once = quorum.signatures[:64]
    fixture.refuses(changed(quorum, voters=(0, 0, 0), signatures=once * 3), "strictly increasing")


def test_one_vote_under_several_names_is_refused() -> None:
    fixture = Fixture(Stage.UNMASK)
    quorum = fixture.read(Quorum)
    fixture.refuses(
        changed(quorum, voters=(0, 1, 2, 3), signatures=quorum.signatures[:64] * 4), "client-1 did not sign"
    )


def test_a_forged_vote_is_refused() -> None:
    fixture = Fixture(Stage.UNMASK)
    quorum = fixture.read(Quorum)
    fixture.refuses(changed(quorum, signatures=quorum.signatures[:-64] + bytes(64)), "client-3 did not sign")


def test_a_vote_by_somebody_who_did_not_survive_is_refused() -> None:
    fixture = Fixture(Stage.UNMASK, gone=(4,))
    quorum = fixture.read(Quorum)
    fixture.refuses(changed(quorum, voters=(*quorum.voters[:2], 4)), "cannot be there")


@pytest.mark.parametrize("size", [0, 64 * 4 - 1, 64 * 5])
def test_another_number_of_signatures_than_voters_is_refused(size: int) -> None:
    fixture = Fixture(Stage.UNMASK)
    fixture.refuses(changed(fixture.read(Quorum), signatures=bytes(size)), f"{size} bytes of signatures")


def test_an_advertisement_does_not_pass_for_a_vote() -> None:
    fixture = Fixture(Stage.UNMASK)
    quorum = fixture.read(Quorum)
    entries = [advertised_entry(fixture, index) for index in quorum.voters]
    fixture.refuses(changed(quorum, signatures=b"".join(entry.signature for entry in entries)), "did not sign")


def test_two_views_of_the_survivors_never_both_find_a_quorum() -> None:
    """The server tells half of the clients that client-3 dropped out, and the others that client-4 did."""
    fixture = Fixture(Stage.VOTE, clients=6)
    digest, clients = config_digest(fixture.config), fixture.rehearsal.clients
    views = {0: (0, 1, 2, 3, 4), 1: (0, 1, 2, 3, 4), 2: (0, 1, 2, 3, 4), 3: (0, 1, 2, 3, 5), 5: (0, 1, 2, 3, 5)}
    votes = {
        index: decode(clients[f"client-{index}"].vote(encode(Survivors(digest, view))), Vote, ANY_SIZE).signature
        for index, view in views.items()
    }
    assert fixture.config.quorum == 4
    for view in set(views.values()):
        voters = [index for index in sorted(votes) if index in view][:4]
        both = encode(Quorum(digest, tuple(voters), b"".join(votes[index] for index in voters)))
        for index in (index for index in voters if views[index] == view):
            with pytest.raises(ServerFaultError, match="did not sign what this client signed"):
                clients[f"client-{index}"].unmask(both)


def test_two_views_of_who_shared_never_find_a_quorum_together() -> None:
    """All get the same survivors, but the victim got a list of sharers with one client fewer."""
    rehearsal = Rehearsal.prepare([0] * 6, SEGMENTS)
    config, updates = rehearsal.server.config, random_updates(rehearsal.server.config)
    requests = rehearsal.until(Stage.MASK, updates)
    honest = decode(requests["client-0"], Delivery, ANY_SIZE)
    narrowed = Delivery(honest.config, honest.sharers[:5], honest.encrypted_shares[: 4 * ENCRYPTED_SHARE_BYTES])
    rehearsal.clients["client-0"].mask(encode(narrowed), updates["client-0"])
    votes = []
    for index in range(5):
        if index:
            rehearsal.clients[f"client-{index}"].mask(requests[f"client-{index}"], updates[f"client-{index}"])
        told = encode(Survivors(config_digest(config), tuple(range(5))))
        votes.append(decode(rehearsal.clients[f"client-{index}"].vote(told), Vote, ANY_SIZE).signature)
    quorum = Quorum(config_digest(config), (1, 2, 3, 4), b"".join(votes[1:]))
    with pytest.raises(ServerFaultError, match="did not sign what this client signed"):
        rehearsal.clients["client-0"].unmask(encode(quorum))


# Both shares, replays, inconsistent views


def test_a_client_reveals_once_and_then_nothing_more() -> None:
    fixture = Fixture(Stage.UNMASK, gone=(4,))
    secrets = list(fixture.victim.state.secrets())
    fixture.victim.unmask(fixture.requests["client-0"])
    assert isinstance(fixture.victim.state, Ended)
    assert all(secret.wiped for secret in secrets)
    everybody_dropped = Survivors(config_digest(fixture.config), (0, 1, 2, 3, 4))
    for step, message in (
        (fixture.victim.unmask, fixture.requests["client-0"]),
        (fixture.victim.vote, encode(everybody_dropped)),
    ):
        with pytest.raises(ServerFaultError, match="this client is ended"):
            step(message)


def test_what_is_revealed_gives_b_of_survivors_and_sigma_of_dropouts_and_never_the_other() -> None:
    fixture = Fixture(Stage.SHARE)
    states = {index: fixture.rehearsal.clients[f"client-{index}"].state for index in range(5)}
    b = {index: state.self_seed.value for index, state in states.items()}  # type: ignore[attr-defined]
    sigma = {index: state.mask_seed.value for index, state in states.items()}  # type: ignore[attr-defined]
    requests = fixture.requests
    while fixture.rehearsal.server.stage is not Stage.UNMASK:
        silent = {"client-4"} if fixture.rehearsal.server.stage is Stage.MASK else set()
        requests = fixture.rehearsal.exchange(requests, fixture.updates, silent)
    revealed = [
        decode(fixture.rehearsal.answer(c, r, fixture.updates), Reveal, ANY_SIZE).shares for c, r in requests.items()
    ]
    for owner in range(5):
        shares = [to_element(pieces(each, 32)[owner]) for each in revealed]
        secret = to_bytes(Combiner([1, 2, 3, 4]).combine(shares[:4]))
        assert secret == (sigma if owner == 4 else b)[owner]
        assert secret != (b if owner == 4 else sigma)[owner]
        assert all(len(each) == 5 * 32 for each in revealed)  # one share an owner, not two


def test_the_masked_input_of_a_recovered_dropout_stays_hidden_behind_its_self_mask() -> None:
    """The server withholds a late masked input, recovers its owner's σ, and removes every pairwise mask."""
    fixture = Fixture(Stage.SHARE)
    sigma = fixture.rehearsal.clients["client-4"].state.mask_seed.value  # type: ignore[attr-defined]
    entries = decode(fixture.requests["client-0"], KeyList, ANY_SIZE).entries
    requests = fixture.rehearsal.exchange(fixture.requests, fixture.updates)
    late = decode(fixture.rehearsal.answer("client-4", requests["client-4"], fixture.updates), MaskedInput, ANY_SIZE)
    requests = fixture.rehearsal.exchange(requests, fixture.updates, {"client-4"})
    with pytest.raises(ClientFaultError, match="nothing is asked of it"):
        fixture.rehearsal.server.receive("client-4", encode(late))
    words = {0: np.frombuffer(late.segments[0], word_type(16)).copy()}
    transcript = Transcript(fixture.config, config_digest(fixture.config), entries)
    alone = words[0].copy()
    unmask_sums({0: alone}, transcript, frozenset(range(4)), {4: sigma})
    pairwise = words[0] - alone
    plain = fixture.updates["client-4"]["v"]
    assert pairwise.any()
    for exposed in (words[0] - pairwise, words[0] + pairwise):  # one of the two has the sign that client-4 gave them
        assert np.count_nonzero(exposed == plain) < 3


@pytest.mark.parametrize("stage", [Stage.SHARE, Stage.MASK, Stage.VOTE, Stage.UNMASK])
def test_a_message_of_another_round_is_refused_in_every_exchange(stage: Stage) -> None:
    fixture, other = Fixture(stage), Fixture(stage)
    before = fixture.victim.state
    with pytest.raises(ServerFaultError, match="belongs to another round"):
        fixture.rehearsal.answer("client-0", other.requests["client-0"], fixture.updates)
    assert fixture.victim.state is before


def test_clients_that_were_shown_different_adapters_do_not_recognise_each_others_keys() -> None:
    fixture = Fixture(Stage.ADVERTISE)
    configs = {
        0: fixture.config,
        **{index: changed(fixture.config, adapter_digest="3" * 64) for index in range(1, 5)},
    }
    entries = []
    for index, config in configs.items():
        session = fixture.rehearsal.clients[f"client-{index}"]
        answer = decode(advertise(session, config), Advertisement, ANY_SIZE)
        entries.append(KeyEntry(index, answer.share_key, answer.mask_key, answer.signature))
    with pytest.raises(ServerFaultError, match="client-1 did not sign"):
        fixture.victim.share(encode(KeyList(config_digest(fixture.config), tuple(entries))))


def test_clients_that_were_shown_different_keys_cannot_open_each_others_encrypted_shares() -> None:
    """Two key lists, both with valid signatures, differ in whether client-5 advertised."""
    fixture = Fixture(Stage.SHARE, clients=6)
    keys = fixture.read(KeyList)
    without = encode(changed(keys, entries=keys.entries[:5]))
    for index in range(1, 6):
        fixture.rehearsal.server.receive(
            f"client-{index}",
            fixture.rehearsal.answer(f"client-{index}", fixture.requests[f"client-{index}"], fixture.updates),
        )
    fixture.victim.share(without)
    requests = fixture.rehearsal.server.advance()
    honest = decode(requests["client-1"], Delivery, ANY_SIZE)
    told = Delivery(honest.config, (0, 1, 2, 3, 4), honest.encrypted_shares[: 4 * ENCRYPTED_SHARE_BYTES])
    with pytest.raises(ServerFaultError, match="from client-1 was altered"):
        fixture.victim.mask(encode(told), fixture.updates["client-0"])


def test_a_refusal_never_shows_a_secret() -> None:
    for stage, kind in (
        (Stage.SHARE, KeyList),
        (Stage.MASK, Delivery),
        (Stage.VOTE, Survivors),
        (Stage.UNMASK, Quorum),
    ):
        fixture = Fixture(stage)
        secrets = [secret.value for secret in fixture.victim.state.secrets()]
        for spoilt in (
            b"",
            bytes(100),
            fixture.requests["client-0"][:-1],
            encode(changed(fixture.read(kind), config=bytes(32))),
        ):
            with pytest.raises(ServerFaultError) as refusal:
                fixture.rehearsal.answer("client-0", spoilt, fixture.updates)
            shown = f"{refusal.value!r} {refusal.value.__cause__!r}"
            assert not any(secret.hex() in shown or repr(secret)[2:-1] in shown for secret in secrets)


def fresh_session(
    fixture: Fixture, identity: Identity | None = None, policy: Policy = LENIENT, log: FileRoundLog | None = None
) -> ClientSession:
    """Makes another session of client-0, as after a restart."""
    old = fixture.victim
    return ClientSession("client-0", identity or old.identity, Roster(old.roster.keys), policy, log or old.log)


def advertise(session: ClientSession, config: RoundConfig) -> bytes:
    """Runs exchange 0 with a client for any configuration."""
    return session.advertise(encode(config), base_digest=config.base_digest, adapter_digest=config.adapter_digest)


def signed_entry(
    fixture: Fixture,
    index: int,
    signer: Identity,
    config: RoundConfig | None = None,
    share_key: bytes | None = None,
    mask_key: bytes | None = None,
) -> KeyEntry:
    """Makes an entry with keys of the server's choice and a signature over them."""
    share_key, mask_key = share_key or Agreement(b"\x02" * 32).public, mask_key or Agreement(b"\x03" * 32).public
    statement = advertisement_statement(config_digest(config or fixture.config), index, share_key, mask_key)
    return KeyEntry(index, share_key, mask_key, signer.sign(statement))


def advertised_entry(fixture: Fixture, index: int) -> KeyEntry:
    """Returns the entry of a client in the agreed key list."""
    state: Any = fixture.victim.state
    entry: KeyEntry = state.transcript.keys[index]
    return entry
