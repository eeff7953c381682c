"""A server that lies about a round of training, and networks that lose messages: clients refuse, sums stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_fixture import LAYOUT, Fixture

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec.update_forms import RingTotal
from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import SECURE_EXCHANGES, TrainRequest, decode, encode
from fedtune.core.secagg.exchanged import RoundConfig
from fedtune.core.secagg.exchanged import decode as decode_message
from fedtune.core.secagg.exchanged import encode as encode_message
from fedtune.strategies.aggregation import Frame, RingMean

NAMES = [f"client-{index}" for index in range(6)]
VICTIM = NAMES[0]


def in_the_open(fixture: Fixture, request: TrainRequest, names: list[str]) -> Vector:
    """Returns the expected result of the round: the same contributions, summed in the clear."""
    terms = fixture.device.terms(request)
    frame = Frame(LAYOUT, request.work.factors, fixture.state.adapter, terms=terms)
    summed = RingMean(fixture.federation.method).begin(frame)
    for name in names:
        parts = fixture.device.contribute(name, request).parts
        summed.add({each: RingTotal(part, 1) for each, part in zip(frame.terms, parts, strict=True)})
    return summed.finish().update


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(SECURE_EXCHANGES)), max_size=4))
def test_whoever_vanishes_whenever_the_sum_is_that_of_the_survivors_or_there_is_none(
    losses: list[tuple[str, str]],
) -> None:
    fixture = Fixture(NAMES, ["secure_aggregation.max_dropout=0.34", "federation.aggregation=fedavg"])
    before = fixture.state
    gone = dict(losses)
    order = {kind: index for index, kind in enumerate(SECURE_EXCHANGES)}
    record = fixture.run(lambda name, kind: name in gone and order[kind] >= order[gone[name]])
    survivors = [name for name in NAMES if name not in gone or order[gone[name]] > 2]
    assert len(gone) > 2 or record.aborted is None
    assert [client.id for client in record.survivors] == survivors or record.aborted
    if record.aborted:
        assert fixture.state.adapter.tobytes() == before.adapter.tobytes()
        assert record.secure is None
    else:
        request = decode(
            TrainingRequest.of(
                Fixture(NAMES, ["secure_aggregation.max_dropout=0.34", "federation.aggregation=fedavg"])
            ),
            TrainRequest,
        )
        expected = before.adapter.copy()
        expected[LAYOUT.segment("ab")] += in_the_open(fixture, request, survivors)
        assert fixture.state.adapter.tobytes() == expected.tobytes()
    assert fixture.run().aborted is None, "the next round runs, whatever became of this one"


class TrainingRequest:
    """A server's request in its first round."""

    @staticmethod
    def of(fixture: Fixture) -> bytes:
        return fixture.open().requests.payload(VICTIM)


def first_message(fixture: Fixture) -> tuple[bytes, bytes]:
    exchange = next(fixture.open().exchanges())
    config, request = exchange.requests[VICTIM]
    return config, request


def changed_config(**changes: Any) -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    def change(config: bytes, request: bytes) -> tuple[bytes, bytes]:
        told = decode_message(config, RoundConfig, len(config))
        return encode_message(msgspec.structs.replace(told, **changes)), request

    return change


def changed_request(change_it: Callable[[TrainRequest], TrainRequest]) -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    return lambda config, request: (config, encode(change_it(decode(request, TrainRequest))))


def of_uplink(**changes: Any) -> Callable[[TrainRequest], TrainRequest]:
    return lambda request: msgspec.structs.replace(request, uplink=msgspec.structs.replace(request.uplink, **changes))


def of_work(**changes: Any) -> Callable[[TrainRequest], TrainRequest]:
    return lambda request: msgspec.structs.replace(request, work=msgspec.structs.replace(request.work, **changes))


@pytest.mark.parametrize(
    ("lie", "refusal"),
    [
        (changed_config(round=2), "round"),
        (changed_config(adapter_digest="e" * 64), "adapter"),
        (changed_config(base_digest="e" * 64), "base"),
        (changed_config(context=b"other work"), "work and codec"),
        (changed_request(of_uplink(clips=(1e-3, 1e-3))), "work and codec"),
        (changed_request(of_work(learning_rate=1.0)), "work and codec"),
        (changed_request(of_work(deadline=1e-3)), "work and codec"),
        (changed_request(of_uplink(n_max=5)), "n_max"),
        (changed_request(of_uplink(form="sparse")), "cannot be masked"),
        (changed_request(of_uplink(form="exact")), "cannot be masked"),
        (changed_request(of_uplink(bits=8)), "segments"),
        (changed_request(of_uplink(error_feedback=True)), "error feedback in a ring: a residual carried into a later"),
        (changed_request(lambda request: msgspec.structs.replace(request, job_seed=99)), "work and codec"),
    ],
)
def test_a_configuration_that_is_not_about_the_request_beside_it_is_refused(
    lie: Callable[[bytes, bytes], tuple[bytes, bytes]], refusal: str
) -> None:
    fixture = Fixture(NAMES)
    honest = first_message(fixture)
    with pytest.raises(PeerError, match=refusal):
        fixture.rounds.open(VICTIM, *lie(*honest))
    assert fixture.rounds.open(VICTIM, *honest), "a lie does not keep the client from serving the true round"


PRIVATE = ("privacy.mode=distributed", "privacy.epsilon=100", "privacy.participations=9")
TWELVE = [f"client-{index}" for index in range(12)]
HALVES = {name: 2 if index % 2 else 4 for index, name in enumerate(TWELVE)}


@pytest.mark.parametrize(
    ("fixture", "counted"),
    [
        (Fixture(NAMES, PRIVATE), None),
        (Fixture(TWELVE, ["adapter.tiers=[2, 4]", *PRIVATE], HALVES), (8, 2)),  # 9 and 3 survive, and one may collude
    ],
)
def test_a_client_adds_no_less_noise_than_its_own_view_of_who_may_be_missing_asks(
    fixture: Fixture, counted: tuple[int, ...] | None
) -> None:
    """The more clients are counted on for noise, the less each of them adds."""
    config, request = first_message(fixture)
    told, asked = decode_message(config, RoundConfig, len(config)), decode(request, TrainRequest)
    assert asked.uplink.noised == (counted or (told.minimum - 1,))
    for place in range(len(asked.uplink.noised)):
        noised = list(asked.uplink.noised)
        noised[place] += 1
        more = msgspec.structs.replace(asked.uplink, noised=tuple(noised))
        with pytest.raises(PeerError, match="noised"):
            fixture.rounds.open(VICTIM, config, encode(msgspec.structs.replace(asked, uplink=more)))
    assert fixture.rounds.open(VICTIM, config, request)


def test_noise_is_counted_for_every_slice_of_a_round() -> None:
    fixture = Fixture(NAMES, PRIVATE)
    two = changed_request(
        lambda asked: msgspec.structs.replace(asked, uplink=msgspec.structs.replace(asked.uplink, noised=(5, 5)))
    )
    with pytest.raises(PeerError, match="2 numbers of noised clients for 1 slices"):
        fixture.rounds.open(VICTIM, *two(*first_message(fixture)))


def test_a_client_that_is_asked_for_another_tier_than_its_client_indices_refuses() -> None:
    names = [f"client-{index}" for index in range(12)]
    ranks = {name: 2 if index % 2 else 4 for index, name in enumerate(names)}
    fixture = Fixture(names, ["adapter.tiers=[2, 4]"], ranks)
    honest = first_message(fixture)
    assert decode(honest[1], TrainRequest).tier == 4
    with pytest.raises(PeerError, match=r"does not match the request to client-0: tier$"):
        fixture.rounds.open(VICTIM, *changed_request(lambda request: msgspec.structs.replace(request, tier=2))(*honest))
    assert fixture.rounds.open(VICTIM, *honest)


def test_a_client_trains_once_a_round_and_sends_one_masked_update() -> None:
    fixture = Fixture(NAMES)
    round_ = fixture.open()
    exchanges = round_.exchanges()
    for _ in range(2):
        exchange = next(exchanges)
        for name in NAMES:
            round_.take_in(name, fixture.answer(name, exchange))
    (delivery,) = next(exchanges).requests[VICTIM]
    assert fixture.rounds.train(VICTIM, delivery)
    with pytest.raises(PeerError, match="out of order"):
        fixture.rounds.train(VICTIM, delivery)


def test_no_exchange_is_answered_before_a_round_is_open_or_after_it_is_over() -> None:
    fixture = Fixture(NAMES)
    for step in (fixture.rounds.share, fixture.rounds.train, fixture.rounds.vote, fixture.rounds.unmask):
        with pytest.raises(PeerError, match="no secure round is open"):
            step(VICTIM, b"")
    fixture.run()
    with pytest.raises(PeerError, match="no secure round is open"):
        fixture.rounds.unmask(VICTIM, b"")


def test_a_round_that_was_opened_is_never_served_again() -> None:
    fixture = Fixture(NAMES)
    before = fixture.state
    fixture.run()
    fixture.state = before
    again = fixture.run()
    assert "0 clients" in (again.aborted or "")
    assert all("the last one served" in (client.dropped or "") for client in again.clients)


def test_a_round_that_was_cut_off_early_is_tried_again_by_a_server_that_restarts() -> None:
    fixture = Fixture(NAMES)
    exchange = next(fixture.open().exchanges())
    for name in NAMES:
        fixture.answer(name, exchange)  # and the server crashes
    assert fixture.run().aborted is None


def test_a_server_that_restarts_after_all_updates_were_masked_goes_on_with_the_next_round() -> None:
    """No device serves the round again; it aborts, and costs one exchange."""
    fixture = Fixture(NAMES)
    round_ = fixture.open()
    exchanges = round_.exchanges()
    for _ in range(3):
        exchange = next(exchanges)
        for name in NAMES:
            round_.take_in(name, fixture.answer(name, exchange))  # and the server crashes
    again = fixture.run()
    assert "0 clients" in (again.aborted or "")
    assert all("the last one served" in (client.dropped or "") for client in again.clients)
    following = fixture.run()
    assert (following.round, following.aborted) == (again.round + 1, None)


def test_a_new_round_ends_the_one_that_was_open() -> None:
    fixture = Fixture(NAMES)
    fixture.rounds.open(VICTIM, *first_message(fixture))
    fixture.rounds.open(VICTIM, *first_message(fixture))
    assert fixture.run().aborted is None


def test_a_configuration_for_another_job_than_the_device_s_terms_is_refused() -> None:
    """Under another job's name the device's log would not know the rounds that it has served."""
    fixture = Fixture(NAMES)
    fixture.device.job = "f" * 64
    with pytest.raises(PeerError, match=r"does not match the request to .*: job"):
        fixture.rounds.open(VICTIM, *first_message(fixture))
    fixture.device.job = fixture.federation.terms.digest
    assert fixture.rounds.open(VICTIM, *first_message(fixture))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 4), st.binary(max_size=300), st.booleans(), st.integers(0, 1 << 20))
def test_bytes_from_nowhere_are_refused_and_change_nothing(stage: int, noise: bytes, mutate: bool, place: int) -> None:
    fixture = Fixture(NAMES)
    round_ = fixture.open()
    for reached, exchange in enumerate(round_.exchanges()):
        if reached == stage:
            parts = list(exchange.requests[VICTIM])
            if mutate and stage:  # another nonce makes another valid round
                spoiled = bytearray(parts[0])
                spoiled[place % len(spoiled)] ^= 1 + (place % 255)
                parts[0] = bytes(spoiled)
            else:
                parts[0] = noise
            steps = (
                fixture.rounds.open,
                fixture.rounds.share,
                fixture.rounds.train,
                fixture.rounds.vote,
                fixture.rounds.unmask,
            )
            with pytest.raises(PeerError):
                steps[stage](VICTIM, *parts)
            round_.take_in(NAMES[1], noise)  # and the server refuses a client's noise
        for name in exchange.requests:
            round_.take_in(name, fixture.answer(name, exchange) if reached < stage or name != NAMES[1] else noise)
    after, record = round_.close()
    assert np.isfinite(after.adapter).all()
    assert record.aborted is None or after.adapter.tobytes() == fixture.state.adapter.tobytes()
