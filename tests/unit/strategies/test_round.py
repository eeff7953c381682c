"""A round without I/O: its requests, the replies it accepts, and its outcome."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from fedtune.core.adapter.layout import AdaptedModule, adapter_digest
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.codec import ExactCodec
from fedtune.core.codec.downlink import receive
from fedtune.core.codec.wire import Kind, frame
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.round_terms import scheduled_learning_rate
from fedtune.core.protocol.messages import (
    Base,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
    decode,
    encode,
)
from fedtune.core.round_records import ClientRecord, RoundRecord
from fedtune.strategies import round as round_module
from fedtune.strategies.assembly import Clients, Parts, assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.cohorts.selection import Selection
from fedtune.strategies.evaluation_round import EvaluationRound, clients_evaluate, pooled, scored_sets
from fedtune.strategies.federation import Federation, initial_state
from fedtune.strategies.round import LATE, TRANSITIONS, Event, Phase, TrainingRound
from fedtune.strategies.schedule import ByDeadline, Closing

LAYOUT = LoraLayout((AdaptedModule("q", 4, 3),), rank=2, alpha=2.0)
BASE = Base("demo", "0" * 64, "nf4", 2, 2.0, ("all-linear",), 256)
NAMES = ["ann", "bob", "cid"]
PLAIN = (
    *("secure_aggregation.enabled=false", "compression.preset=none", "federation.aggregation=alternating"),
    "federation.weight=examples",
)


def federation(*overrides: str) -> Federation:
    return assemble(load_job(None, [*PLAIN, *overrides]), BASE, LAYOUT)


def payload(value: float, count: int = 6) -> bytes:
    """Makes an exact payload of any values, also of values that the codec refuses to encode."""
    return frame(Kind.EXACT, count, np.full(count, value, dtype="<f4").tobytes())


def reply(round_: TrainingRound, value: float, examples: int = 10, **changes: Any) -> bytes:
    update = tuple(ExactCodec().encode(np.full(terms.count, value, dtype=np.float32)) for terms in round_.plan.terms)
    answer = TrainReply(round_.number, examples, 5 * examples, 20, 1.0, 0.1, update)
    return encode(msgspec.structs.replace(answer, **changes))


def broadcast(bits: int | None = None) -> Broadcast:
    return Broadcast(LAYOUT, LAYOUT.initial(0), bits)


def opened(number: int = 1, *overrides: str) -> TrainingRound:
    fed = federation(*overrides)
    return asked(TrainingRound.open(fed, replace(initial_state(fed), round=number - 1), NAMES, broadcast()))


def asked(round_: TrainingRound) -> TrainingRound:
    """Begins the round's one exchange."""
    next(round_.exchanges())
    return round_


def test_the_request_carries_the_adapter_and_its_digest() -> None:
    round_ = opened()
    request = decode(round_.requests.payload("ann"), TrainRequest)
    received = receive(LAYOUT, LAYOUT.initial(0), request.adapter)
    assert received.tobytes() == round_.state.held.tobytes()
    assert request.adapter.digest == adapter_digest(received)
    assert (request.round, request.work.local_steps, request.work.factors) == (1, 20, "b")


def test_the_aggregate_is_the_weighted_mean_of_the_updates() -> None:
    round_ = opened()
    for name, value, examples in (("ann", 1.0, 10), ("bob", 4.0, 20), ("cid", 0.0, 0)):
        round_.take_in(name, reply(round_, value, examples))
    after, record = round_.close()
    adapter = after.adapter
    changed = adapter[LAYOUT.segment("b")] - round_.state.adapter[LAYOUT.segment("b")]
    assert changed == pytest.approx(3.0)
    assert (adapter[LAYOUT.segment("a")] == round_.state.adapter[LAYOUT.segment("a")]).all()
    assert [client.dropped is None for client in record.clients] == [True, True, False]
    assert record.train_loss == pytest.approx(1.0)


def test_order_of_arrival_changes_nothing() -> None:
    results = []
    for order in (NAMES, NAMES[::-1]):
        round_ = opened()
        for name in order:
            round_.take_in(name, reply(round_, 0.1 * (1 + NAMES.index(name)), 3 + NAMES.index(name)))
        results.append(round_.close()[0].adapter.tobytes())
    assert results[0] == results[1]


def test_a_round_takes_a_clip_within_what_its_steps_can_reach() -> None:
    ring = ("compression.preset=balanced", "compression.form=ring", "federation.weight=uniform", "federation.rounds=4")

    def clip(adapted: float, *overrides: str, number: int = 1) -> float:
        fed = federation(*ring, *overrides)
        state = replace(initial_state(fed), round=number - 1, clips={"a": adapted, "b": adapted})
        return TrainingRound.open(fed, state, NAMES, broadcast()).plan.terms[0].clip

    most = initial_state(federation(*ring)).clips["b"]
    assert clip(most / 3) == most / 3
    assert clip(1e9) == clip(most) == most
    assert clip(1e9, number=3) == pytest.approx(most / 2)
    assert clip(1e-9) == pytest.approx(most / 64)
    assert clip(1e9, "training.local_epochs=1") == 1e9


def test_alternating_rounds_change_one_factor_and_fedavg_both() -> None:
    assert [opened(number).plan.factors for number in (1, 2, 3)] == ["b", "a", "b"]
    assert opened(1, "federation.aggregation=fedavg").plan.factors == "ab"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 7}, "an update for round 7; expected round 1"),
        ({"update": (b"\x00" * 8,)}, "payload: truncated"),
        ({"update": (payload(np.nan),)}, "NaN or infinity"),
        ({"update": (payload(1e9),)}, "a value of 1000000000.0"),
        ({"update": (b"\x00" * 100_000,)}, "at most"),
        ({"update": (payload(1.0), payload(1.0))}, "2 payloads; expected one for each"),
        ({"examples": -1}, "TrainReply"),
        ({"loss": float("inf")}, "TrainReply"),
    ],
)
def test_a_reply_that_cannot_be_used_costs_only_that_client(changes: dict[str, Any], reason: str) -> None:
    round_ = opened()
    round_.take_in("ann", reply(round_, 1.0))
    round_.take_in("bob", reply(round_, 1.0, **changes))
    round_.take_in("cid", b"\x00garbage")
    after, record = round_.close()
    adapter = after.adapter
    assert adapter[LAYOUT.segment("b")] == pytest.approx(1.0)
    assert record.clients[0].dropped is None
    assert reason in (record.clients[1].dropped or "")
    assert "TrainReply" in (record.clients[2].dropped or "")


def test_a_second_reply_and_an_unknown_client_are_ignored() -> None:
    round_ = opened()
    round_.take_in("ann", reply(round_, 1.0))
    round_.take_in("ann", reply(round_, 9.0))
    round_.take_in("eve", reply(round_, 9.0))
    after, record = round_.close()
    adapter = after.adapter
    assert adapter[LAYOUT.segment("b")] == pytest.approx(1.0)
    assert [client.id for client in record.clients] == NAMES


def test_too_few_survivors_leave_the_adapter_as_it_was() -> None:
    round_ = opened(1, "federation.minimum_clients=2")
    round_.take_in("ann", reply(round_, 1.0))
    round_.give_up("bob", "gone")
    after, record = round_.close()
    adapter = after.adapter
    assert adapter.tobytes() == round_.state.adapter.tobytes()
    assert record.aborted == "1 of 3 clients survived; at least 2 must"
    assert [client.dropped for client in record.clients] == [None, "gone", LATE]


def test_a_client_cannot_weigh_more_than_the_cap() -> None:
    round_ = opened(1, "federation.weight_cap=10")
    round_.take_in("ann", reply(round_, 1.0, examples=10))
    round_.take_in("bob", reply(round_, 3.0, examples=10**9))
    assert round_.close()[0].adapter[LAYOUT.segment("b")] == pytest.approx(2.0)


@dataclass
class Seen:
    """A tracker that records its clients."""

    clients: list[ClientRecord]

    def client(self, record: ClientRecord) -> None:
        self.clients.append(record)

    def round(self, record: RoundRecord) -> None:
        pass


def test_every_client_is_observed_once() -> None:
    seen: list[ClientRecord] = []
    watched = replace(federation(), trackers=[Seen(seen)])
    round_ = asked(TrainingRound.open(watched, initial_state(watched), NAMES, broadcast()))
    round_.take_in("bob", reply(round_, 1.0))
    round_.give_up("ann", "gone")
    round_.close()
    assert [record.id for record in seen] == ["bob", "ann", "cid"]


def test_bytes_are_those_of_the_payloads() -> None:
    round_ = opened()
    data = reply(round_, 1.0)
    round_.take_in("ann", data)
    _, record = round_.close()
    assert record.traffic.bytes_up == len(data)
    assert record.traffic.bytes_down == 3 * len(round_.requests.payload("ann"))


def test_the_cohort_follows_from_seed_and_round() -> None:
    names = [f"client-{index}" for index in range(50)]

    def cohort(number: int, *overrides: str) -> tuple[str, ...]:
        fed = federation(*overrides)
        return TrainingRound.open(fed, replace(initial_state(fed), round=number - 1), names, broadcast()).cohort

    assert cohort(1) == cohort(1)
    assert cohort(1) != cohort(2)
    assert cohort(1) != cohort(1, "training.seed=1")
    assert len(set(cohort(1))) == 10
    assert len(cohort(1, "federation.clients_per_round=0.5")) == 25
    assert len(cohort(1, "federation.clients_per_round=99")) == 50


def test_a_round_by_deadline_tells_it_to_all_and_closes_by_it() -> None:
    names = [f"client-{index:02d}" for index in range(20)]
    seconds = dict.fromkeys(names, 2.0) | {"client-07": 500.0}
    job = load_job(None, [*PLAIN, "federation.selection=deadline", "federation.clients_per_round=10"])
    first = assemble(job, BASE, LAYOUT, Clients(len(names), seconds=seconds))
    assert next(TrainingRound.open(first, initial_state(first), names, broadcast()).exchanges()).closing is None
    learned = first.selection.learned(1, [ClientRecord(name, answered=2.5) for name in names[:3]])
    fed = replace(first, selection=learned)
    round_ = TrainingRound.open(fed, initial_state(fed), names, broadcast())
    exchange = next(round_.exchanges())
    assert exchange.closing is not None
    assert exchange.closing.seconds == pytest.approx(1.3 * 2.0 + 0.5)
    assert (exchange.closing.enough, exchange.closing.least) == (10, 5)
    assert len(exchange.requests) == 13
    assert "client-07" not in exchange.requests  # which could not do a tenth of the work by then
    requests = [decode(parts[0], TrainRequest) for parts in exchange.requests.values()]
    assert {request.work.deadline for request in requests} == {exchange.closing.seconds}
    secure = load_job(None, ["secure_aggregation.max_dropout=0.2"])
    closing = ByDeadline(secure).closing(learned, names, 13)
    assert closing == Closing(exchange.closing.seconds, 11, 11)  # with fewer the sum would not be opened


def test_clients_evaluate_after_the_last_round_and_as_often_as_the_job_says() -> None:
    job = load_job(None, ["federation.rounds=5", "federation.evaluate_clients_every=2"])
    assert [clients_evaluate(job, number) for number in range(1, 6)] == [False, True, False, True, True]
    assert not clients_evaluate(load_job(None, ["data.holdout=0"]), 20)


@pytest.mark.parametrize(
    ("overrides", "sets"),
    [
        ([], "the server's held-out examples .* and from examples that clients keep back .*, after the last round"),
        (["data.evaluation="], r"examples that clients keep back \(data.holdout = 0.1 of each client's\)"),
        (["data.holdout=0"], r"the server's held-out examples \(data.evaluation = demo\)"),
        (["data.evaluation=", "data.holdout=0"], "none: the server has no examples"),
        (["data.evaluation=", "privacy.mode=distributed"], "none: the server has no examples"),
    ],
)
def test_a_run_says_which_examples_its_scores_are_from(overrides: list[str], sets: str) -> None:
    assert re.fullmatch(f"{sets}.*", scored_sets(load_job(None, overrides)))


def test_an_evaluation_round_keeps_scores_and_marks_the_silent() -> None:
    round_ = EvaluationRound.open(federation(), replace(initial_state(federation()), round=4), NAMES, broadcast())
    assert decode(round_.requests.payload("ann"), EvaluateRequest).round == 4
    round_.take_in("ann", encode(EvaluateReply(4, 10, 100, 1.0, 0.5)))
    round_.take_in("bob", encode(EvaluateReply(4, 30, 300, 2.0, 1.0)))
    round_.take_in("cid", b"garbage")
    parts = round_.close()
    assert [part.evaluation is not None for part in parts] == [True, True, False]
    score = pooled(parts)
    assert score is not None
    assert (score.loss, score.exact_match) == pytest.approx((1.75, 0.875))
    assert score.examples == 40
    assert pooled([]) is None


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.1464466)])
def test_the_learning_rate_follows_its_schedule(schedule: str, last: float) -> None:
    job = load_job(None, ["federation.rounds=4", f"training.schedule={schedule}", "training.learning_rate=1.0"])
    rates = [scheduled_learning_rate(job, number) for number in range(1, 5)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(last)
    assert rates == sorted(rates, reverse=True)


def test_a_round_does_not_touch_the_state_it_was_given() -> None:
    round_ = opened()
    before = round_.state.adapter.copy()
    round_.take_in("ann", reply(round_, 1.0))
    round_.close()
    assert round_.state.adapter.tobytes() == before.tobytes()


def test_uniform_and_token_weights_are_choices() -> None:
    for weight, expected in (("uniform", 2.0), ("tokens", 2.5), ("examples", 2.5)):
        round_ = opened(1, f"federation.weight={weight}")
        round_.take_in("ann", reply(round_, 1.0, examples=1))
        round_.take_in("bob", reply(round_, 3.0, examples=3))
        assert round_.close()[0].adapter[LAYOUT.segment("b")] == pytest.approx(expected)


def test_a_server_optimizers_state_goes_from_round_to_round() -> None:
    fed = federation("federation.server_optimizer=momentum", "federation.aggregation=ffa")
    state = initial_state(fed)
    for number, moved in ((1, 1.0), (2, 1.9), (3, 2.71)):
        round_ = asked(TrainingRound.open(fed, state, NAMES, broadcast()))
        round_.take_in("ann", reply(round_, 1.0))
        before = state.adapter[LAYOUT.segment("b")]
        state, _ = round_.close()
        assert state.round == number
        assert state.adapter[LAYOUT.segment("b")] - before == pytest.approx(moved)
    assert set(state.server) == {"optimizer.m.b"}


def test_only_fedrot_asks_clients_to_turn_their_factors() -> None:
    for name, turned in (("fedavg", False), ("fedrot", True)):
        request = decode(opened(1, f"federation.aggregation={name}").requests.payload("ann"), TrainRequest)
        assert request.work.align is turned
    assert decode(opened(1, "training.proximal=0.5").requests.payload("ann"), TrainRequest).work.proximal == 0.5


FEDAVG = "federation.aggregation=fedavg"


def next_round(first: TrainingRound) -> TrainingRound:
    """Begins the round after one in which only cid was in time."""
    first.take_in("cid", reply(first, 1.0, 10))
    first.give_up("ann", LATE)
    first.give_up("bob", LATE)
    return first


def test_a_late_update_counts_in_the_next_round_at_less_weight_and_only_there() -> None:
    first = next_round(opened(1, FEDAVG))
    late = reply(first, 4.0, 20)
    first.take_stale("ann", late)
    first.take_stale("ann", reply(first, 9.0, 20))  # a second answer is ignored
    first.take_stale("cid", reply(first, 9.0, 20))  # it was in time
    state, _ = first.close()
    assert state.stale_updates == {"ann": late}
    second = asked(TrainingRound.open(federation(FEDAVG), state, NAMES, broadcast()))
    second.take_in("bob", reply(second, 1.0, 10))
    after, record = second.close()
    weight = round(20 / 2**0.5)
    assert after.adapter - state.adapter == pytest.approx((10 * 1.0 + weight * 4.0) / (10 + weight), abs=1e-6)
    assert record.notes == ("the late update of ann was taken at 0.71 of its weight",)
    assert after.stale_updates == {}


def test_who_is_in_time_again_has_no_late_update_beside_it() -> None:
    first = next_round(opened(1, FEDAVG))
    first.take_stale("ann", reply(first, 4.0, 20))
    state, _ = first.close()
    second = asked(TrainingRound.open(federation(FEDAVG), state, NAMES, broadcast()))
    second.take_in("ann", reply(second, 1.0, 10))
    after, record = second.close()
    assert after.adapter - state.adapter == pytest.approx(1.0)
    assert record.notes == ()


@dataclass(frozen=True)
class Buffered:
    """Closes a round with its first two answers (FedBuff, Nguyen et al. 2022); the others count in the next one."""

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> Closing:
        del selection, population
        return Closing(seconds=0.0, enough=min(2, cohort), least=1)


def test_a_toy_schedule_of_buffered_rounds_is_an_object_that_is_handed_over() -> None:
    job = load_job(None, [*PLAIN, FEDAVG])
    fed = assemble(job, BASE, LAYOUT, parts=Parts(schedule=Buffered()))
    first = TrainingRound.open(fed, initial_state(fed), NAMES, broadcast())
    exchange = next(first.exchanges())
    assert exchange.closing == Closing(0.0, 2, 1)
    for name in ("ann", "bob"):
        first.take_in(name, reply(first, 1.0))
    first.give_up("cid", LATE)
    first.take_stale("cid", reply(first, 4.0))
    state, record = first.close()
    assert [client.id for client in record.survivors] == ["ann", "bob"]
    second = asked(TrainingRound.open(fed, state, NAMES, broadcast()))
    second.take_in("ann", reply(second, 1.0))
    after, _ = second.close()
    assert (after.adapter - state.adapter).max() > 1.5


@pytest.mark.parametrize("bad", ["garbage", "another round", "another factor", "nan", "no examples"])
def test_a_late_update_that_cannot_be_used_is_dropped_with_the_reason(bad: str) -> None:
    first = next_round(opened(1, FEDAVG))
    answers = {
        "garbage": b"\x93",
        "another round": reply(first, 4.0, round=7),
        "another factor": reply(first, 4.0, update=(payload(1.0),)),
        "nan": reply(first, 4.0, update=(payload(float("nan"), 8), payload(1.0))),
        "no examples": reply(first, 4.0, 0),
    }
    first.take_stale("ann", answers[bad])
    state, _ = first.close()
    second = asked(TrainingRound.open(federation(FEDAVG), state, NAMES, broadcast()))
    second.take_in("bob", reply(second, 1.0, 10))
    after, record = second.close()
    assert after.adapter - state.adapter == pytest.approx(1.0)
    assert record.notes[0].startswith("the late update of ann was dropped: ")


def test_absurd_claims_buy_a_client_no_more_than_the_cap_in_time_or_late() -> None:
    absurd: dict[str, Any] = {"examples": 1 << 40, "tokens": 1 << 40, "seconds": 1e300}
    first = opened(1, FEDAVG, "federation.weight_cap=10")
    first.take_in("cid", reply(first, 1.0, 10))
    first.take_in("bob", reply(first, 3.0, **absurd))
    first.give_up("ann", LATE)
    first.take_stale("ann", reply(first, 4.0, **absurd))
    state, record = first.close()
    assert state.adapter - first.state.adapter == pytest.approx(2.0)
    assert record.aborted is None
    second = asked(TrainingRound.open(federation(FEDAVG, "federation.weight_cap=10"), state, NAMES, broadcast()))
    second.take_in("bob", reply(second, 1.0, 10))
    after, _ = second.close()
    assert after.adapter - state.adapter == pytest.approx((10 * 1.0 + 7 * 4.0) / 17, abs=1e-6)


@pytest.mark.parametrize(
    ("events", "moved"),
    [
        (["update"], 2.5),
        (["update", "another update"], 2.5),
        (["update", "give up"], 2.5),
        (["give up", "update"], 1.0),
        (["give up", "give up"], 1.0),
        ([], 1.0),
    ],
)
def test_an_event_that_the_table_does_not_have_changes_nothing(events: list[str], moved: float) -> None:
    round_ = opened(1, FEDAVG)
    round_.take_in("bob", reply(round_, 1.0))
    for event in events:
        if event == "give up":
            round_.give_up("ann", LATE)
        else:
            round_.take_in("ann", reply(round_, 4.0 if event == "update" else 8.0))
    state, record = round_.close()
    assert state.adapter - round_.state.adapter == pytest.approx(moved)
    assert record.clients[0].dropped == (None if moved > 1.0 else LATE)


def test_nothing_counts_before_a_client_is_asked() -> None:
    fed = federation(FEDAVG)
    round_ = TrainingRound.open(fed, initial_state(fed), NAMES, broadcast())
    round_.take_in("ann", reply(round_, 4.0))
    round_.give_up("bob", LATE)
    asked(round_)
    for name in NAMES:
        round_.take_in(name, reply(round_, 1.0))
    state, record = round_.close()
    assert state.adapter - round_.state.adapter == pytest.approx(1.0)
    assert all(client.dropped is None for client in record.clients)


def test_every_phase_but_the_last_has_a_way_on() -> None:
    assert {before for before, _ in TRANSITIONS} == set(Phase) - {Phase.OUT}


def test_the_table_alone_decides_whose_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = opened(1, FEDAVG)
    round_.take_in("bob", reply(round_, 1.0))
    rest = {key: after for key, after in TRANSITIONS.items() if key != (Phase.ASKED, Event.UPDATE)}
    monkeypatch.setattr(round_module, "TRANSITIONS", rest)
    round_.take_in("ann", reply(round_, 4.0))
    state, record = round_.close()
    assert record.clients[0].dropped == LATE
    assert state.adapter - round_.state.adapter == pytest.approx(1.0)
