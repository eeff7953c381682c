"""Hostile devices in groups: who makes sums fail without a name is found, and who poisons one group moves no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, log2
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from secure_fixture import Fixture, Untrained

from fedtune.client.device import Contribution
from fedtune.core.codec.maskable import MaskableCodec, RingUpdate
from fedtune.core.protocol.messages import SECURE_EXCHANGES, SHARE, TRAIN, UNMASK, TrainRequest, query
from fedtune.core.secagg import Policy
from fedtune.core.secagg.exchanged import EncryptedShares, MaskedInput, Reveal, decode, encode
from fedtune.core.secagg.shamir import random_element
from fedtune.strategies.aggregation.evidence import Evidence
from fedtune.strategies.cohorts.suspicion import UNSUSPECTED
from fedtune.strategies.collection import Exchange

NAMES = [f"client-{index:02d}" for index in range(10)]
CULPRIT = "client-03"
ANY_SIZE = 1 << 24


def changed(payload: bytes, kind: type[Any], **changes: Any) -> bytes:
    return encode(msgspec.structs.replace(decode(payload, kind, ANY_SIZE), **changes))


def wrong_commitment(payload: bytes) -> bytes:
    return changed(payload, EncryptedShares, commitment=bytes(32))


def shares_that_do_not_open(payload: bytes) -> bytes:
    sealed = decode(payload, EncryptedShares, ANY_SIZE).encrypted_shares
    return changed(payload, EncryptedShares, encrypted_shares=bytes(byte ^ 1 for byte in sealed))


def words_out_of_range(payload: bytes) -> bytes:
    *words, auxiliary = decode(payload, MaskedInput, ANY_SIZE).segments
    random = np.random.default_rng(1)
    garbage = (random.bytes(len(each) - 1) + each[-1:] for each in words)  # the last byte has bits that are 0
    return changed(payload, MaskedInput, segments=(*garbage, auxiliary))


def auxiliary_sums_out_of_range(payload: bytes) -> bytes:
    *words, auxiliary = decode(payload, MaskedInput, ANY_SIZE).segments
    return changed(payload, MaskedInput, segments=(*words, bytes(byte ^ 0xA5 for byte in auxiliary)))


def wrong_shares_at_the_end(payload: bytes) -> bytes:
    shares = decode(payload, Reveal, ANY_SIZE).shares
    return changed(payload, Reveal, shares=bytes(byte ^ (place % 32 == 31) for place, byte in enumerate(shares)))


Attack = tuple[str, Callable[[bytes], bytes]]
ATTACKS: dict[str, Attack] = {
    "a commitment to another secret": (query(SHARE), wrong_commitment),
    "shares that do not open": (query(SHARE), shares_that_do_not_open),
    "words out of range": (TRAIN, words_out_of_range),
    "auxiliary sums out of range": (TRAIN, auxiliary_sums_out_of_range),
}


class Hostile(Fixture):
    """A fixture in which some clients change their answer to one exchange of every round.

    With words of one bit a quarter of a ring or more is out of range, so that no garbage stays unnoticed.
    """

    def __init__(self, names: list[str], attacks: dict[str, Attack], *overrides: str, **more: Any) -> None:
        super().__init__(names, [*overrides, "federation.aggregation=fedavg", "compression.bits=1"], **more)
        self.attacks = attacks

    def answer(self, name: str, exchange: Exchange) -> bytes:
        payload = super().answer(name, exchange)
        kind, spoil = self.attacks.get(name, ("", bytes))
        return spoil(payload) if kind == exchange.message_type else payload


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_device_that_ends_every_sum_without_being_named_is_found_within_log_rounds_and_left_out(
    attack: str, groups: int
) -> None:
    fixture = Hostile(NAMES, {CULPRIT: ATTACKS[attack]}, f"secure_aggregation.groups={groups}")
    bound = ceil(log2(len(NAMES))) + 1
    records = [fixture.run() for _ in range(bound)]
    found = fixture.state.suspicion
    assert found.suspects <= {CULPRIT}
    assert found.suspects or found.excluded == (CULPRIT,)
    assert (groups == 1) == (records[0].aborted is not None)
    assert all(record.aborted is None for record in records[1:]), "the other groups go on"
    assert all(CULPRIT not in [client.id for client in record.survivors] for record in records[1:])
    records.append(fixture.run())
    assert fixture.state.suspicion.excluded == (CULPRIT,)
    told = [note for record in records for note in record.notes]
    assert any(note.startswith(f"{CULPRIT} is left out from now on") for note in told)
    assert f"suspects of a failed sum, 1: {CULPRIT}" in told
    after = fixture.run()
    assert after.aborted is None
    assert [client.id for client in after.survivors] == [name for name in NAMES if name != CULPRIT]
    assert not after.notes


def test_shares_that_lie_on_no_polynomial_are_traced_too() -> None:
    fixture = Hostile(NAMES, {})
    honest = fixture.rounds.share

    def share(client: str, message: bytes) -> bytes:
        def split(secret: int, threshold: int, points: Sequence[int], random: Callable[[int], bytes]) -> list[int]:
            del secret, threshold
            return [random_element(random) for _ in points]

        if client != CULPRIT:
            return honest(client, message)
        with patch("fedtune.core.secagg.shamir.split", split):
            return honest(client, message)

    with patch.object(fixture.rounds, "share", share):
        first = fixture.run()
        assert "do not fit together" in (first.aborted or "")
        for _ in range(5):
            fixture.run()
    assert fixture.state.suspicion.excluded == (CULPRIT,)


def test_a_holder_that_reveals_wrong_shares_in_small_groups_is_found_and_no_dealer_is_blamed_for_it() -> None:
    attack = (query(UNMASK), wrong_shares_at_the_end)
    fixture = Hostile(NAMES, {CULPRIT: attack}, "secure_aggregation.groups=2")
    record = fixture.run()
    assert any("do not fit together" in note for note in record.notes)
    for _ in range(4):
        fixture.run()
    assert fixture.state.suspicion.excluded == (CULPRIT,)


def test_devices_that_vanish_are_named_already_and_make_no_suspects() -> None:
    fixture = Fixture(NAMES, ["secure_aggregation.groups=2"])
    for kind in SECURE_EXCHANGES:
        gone: list[str] = []
        for exchange in (round_ := fixture.open()).exchanges():
            gone = gone or sorted(exchange.requests)[:1]
            group = next(group for group in round_.plan.grouping.groups if gone[0] in group)
            for name in exchange.requests:
                if exchange.message_type == kind and name in group[:2]:
                    round_.give_up(name, "gone")
                else:
                    round_.take_in(name, fixture.answer(name, exchange))
        fixture.state, record = round_.close()
        assert record.aborted is None
        assert record.secure is not None
        assert (record.secure.groups, record.secure.smallest) == (1, 5)
        assert len(record.survivors) == 5
        assert fixture.state.suspicion == UNSUSPECTED


def test_a_round_goes_on_with_the_groups_that_have_a_sum_if_they_are_enough() -> None:
    for least, goes_on in ((5, True), (6, False)):
        fixture = Hostile(
            NAMES,
            {CULPRIT: ATTACKS["words out of range"]},
            "secure_aggregation.groups=2",
            f"federation.minimum_clients={least}",
        )
        before = fixture.digest
        record = fixture.run()
        assert (record.aborted is None) is goes_on
        assert (fixture.digest != before) is goes_on
        assert fixture.state.suspicion.suspects > {CULPRIT}, "either way"
        lost = [client.dropped for client in record.clients if client.dropped]
        assert len(lost) == 5
        assert all(str(reason).startswith("its group has no sum: a sum of 5 contributions") for reason in lost)


def test_a_group_below_a_devices_own_minimum_is_refused_by_it() -> None:
    fixture = Fixture(NAMES, ["secure_aggregation.groups=3"])
    own = fixture.rounds._credentials
    strict = {name: replace(own(name), policy=Policy(min_survivors=4)) for name in NAMES}
    fixture.rounds._credentials = strict.__getitem__
    record = fixture.run()
    assert "0 clients" in (record.aborted or "")
    assert {
        "a minimum of 3 survivors is below this client's 4" in str(client.dropped) for client in record.clients
    } == {True}


class Poisoned(Untrained):
    """A device whose hostile clients send words at the ends of their range, all in one direction."""

    hostile = frozenset({CULPRIT})

    def contribute(self, client: str, request: TrainRequest) -> Contribution:
        made = super().contribute(client, request)
        if client not in self.hostile:
            return made
        parts = []
        for terms, part in zip(made.terms, made.parts, strict=True):
            levels = MaskableCodec(terms.bits).ring(terms.context()).levels
            goal = np.random.default_rng(1).integers(2, size=part.words.size) * levels
            parts.append(RingUpdate(goal.astype(np.uint32), part.auxiliary))
        return replace(made, parts=tuple(parts))


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_poisoned_group_is_left_out_by_the_rule_over_groups(rule: str) -> None:
    names = [f"client-{index:02d}" for index in range(15)]
    moved = {}
    for robust in ("none", rule):
        overrides = ("secure_aggregation.groups=5", f"federation.robust={robust}", "federation.aggregation=fedavg")
        adapters = []
        for device in (Poisoned(), Untrained()):
            fixture = Fixture(names, overrides, device=device)
            record = fixture.run()
            assert record.secure is not None
            assert (record.secure.groups, record.secure.smallest, record.secure.summed) == (5, 3, 15)
            adapters.append(fixture.state.adapter)
        moved[robust] = adapters[0] - adapters[1]
    goal = moved["none"] / np.linalg.norm(moved["none"])
    assert float(moved[rule] @ goal) < float(moved["none"] @ goal) / 2


FLEET = [f"client-{index:02d}" for index in range(24)]
TOGETHER = frozenset(FLEET[::6])


class Together(Poisoned):
    """A device on which a sixth of the fleet is hostile."""

    hostile = TOGETHER


def test_clients_that_poison_together_are_found_by_group_testing_and_no_longer_asked_also_after_a_restart() -> None:
    overrides = ("secure_aggregation.groups=8", "federation.robust=group-testing", "federation.aggregation=fedavg")
    fixture = Fixture(FLEET, overrides, device=Together())
    records = [fixture.run() for _ in range(4)]
    stored = json.loads(json.dumps(fixture.state.evidence.to_json()))
    fixture.state = replace(fixture.state, evidence=Evidence.from_json(stored))
    records += [fixture.run() for _ in range(4)]
    assert set(fixture.state.evidence.condemned) == TOGETHER
    told = [note for record in records for note in record.notes]
    assert all(any(note.startswith(f"{name} is left out: ") for note in told) for name in TOGETHER)
    asked = {client.id for client in fixture.run().clients}
    assert asked == set(FLEET) - TOGETHER


def test_a_round_without_a_result_changes_no_evidence() -> None:
    overrides = ("secure_aggregation.groups=8", "federation.robust=group-testing", "federation.minimum_clients=24")
    fixture = Fixture(FLEET, overrides, device=Together())
    fixture.run()
    before = fixture.state.evidence
    assert before.tests
    assert fixture.run(drop=lambda name, kind: name == FLEET[1]).aborted
    assert fixture.state.evidence == before
