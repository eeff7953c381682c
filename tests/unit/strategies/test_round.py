"""A round without any I/O: what is asked, what is taken in, and what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from fedtune.core.adapter import AdaptedModule, AdapterLayout, Vector, adapter_digest
from fedtune.core.job import Job, load_job
from fedtune.core.messages import (
    Base,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
    decode,
    encode,
    vector_from_bytes,
)
from fedtune.core.records import ClientRecord
from fedtune.strategies.round import (
    LATE,
    EvaluationRound,
    Federation,
    TrainingRound,
    clients_evaluate,
    pooled,
    scheduled_learning_rate,
)
from fedtune.strategies.strategy import federation_from_job

LAYOUT = AdapterLayout((AdaptedModule("q", 4, 3),), rank=2, alpha=2.0)
BASE = Base("demo", "0" * 64, "nf4", 2, 2.0, ("all-linear",), 256)
NAMES = ["ann", "bob", "cid"]


def federation(*overrides: str) -> Federation:
    return federation_from_job(load_job(None, overrides), BASE, LAYOUT)


def reply(round_: TrainingRound, value: float, examples: int = 10, **changes: Any) -> bytes:
    segment = LAYOUT.segment(round_.factors)
    update = np.full(segment.stop - segment.start, value, dtype=np.float32).tobytes()
    answer = TrainReply(round_.number, examples, 5 * examples, 20, 1.0, 0.1, update)
    return encode(msgspec.structs.replace(answer, **changes))


def opened(number: int = 1, *overrides: str) -> TrainingRound:
    adapter = LAYOUT.initial(0)
    return TrainingRound.open(federation(*overrides), number, adapter, NAMES)


def test_the_request_carries_the_adapter_and_its_digest() -> None:
    round_ = opened()
    request = decode(round_.request, TrainRequest)
    received = vector_from_bytes(request.adapter, LAYOUT.size)
    assert received.tobytes() == round_.adapter.tobytes()
    assert request.adapter_digest == adapter_digest(received)
    assert (request.round, request.work.local_steps, request.work.factors) == (1, 20, "b")


def test_the_aggregate_is_the_weighted_mean_of_the_updates() -> None:
    round_ = opened()
    for name, value, examples in (("ann", 1.0, 10), ("bob", 4.0, 20), ("cid", 0.0, 0)):
        round_.take_in(name, reply(round_, value, examples))
    adapter, record = round_.close()
    changed = adapter[LAYOUT.segment("b")] - round_.adapter[LAYOUT.segment("b")]
    assert changed == pytest.approx(3.0)
    assert (adapter[LAYOUT.segment("a")] == round_.adapter[LAYOUT.segment("a")]).all()
    assert [client.dropped is None for client in record.clients] == [True, True, False]
    assert record.train_loss == pytest.approx(1.0)


def test_order_of_arrival_changes_nothing() -> None:
    results = []
    for order in (NAMES, NAMES[::-1]):
        round_ = opened()
        for name in order:
            round_.take_in(name, reply(round_, 0.1 * (1 + NAMES.index(name)), 3 + NAMES.index(name)))
        results.append(round_.close()[0].tobytes())
    assert results[0] == results[1]


def test_alternating_rounds_change_one_factor_and_fedavg_both() -> None:
    assert [opened(number).factors for number in (1, 2, 3)] == ["b", "a", "b"]
    assert opened(1, "federation.aggregation=fedavg").factors == "ab"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 7}, "an update for round 7; expected round 1"),
        ({"update": b"\x00" * 8}, "a vector of 8 bytes"),
        ({"update": np.full(6, np.nan, dtype="<f4").tobytes()}, "NaN or Inf"),
        ({"update": np.full(6, 1e9, dtype="<f4").tobytes()}, "a value of 1000000000.0"),
        ({"update": b"\x00" * 100_000}, "at most"),
        ({"examples": -1}, "TrainReply"),
        ({"loss": float("inf")}, "TrainReply"),
    ],
)
def test_a_reply_that_cannot_be_used_costs_only_that_client(changes: dict[str, Any], reason: str) -> None:
    round_ = opened()
    round_.take_in("ann", reply(round_, 1.0))
    round_.take_in("bob", reply(round_, 1.0, **changes))
    round_.take_in("cid", b"\x00garbage")
    adapter, record = round_.close()
    assert adapter[LAYOUT.segment("b")] == pytest.approx(1.0)
    assert record.clients[0].dropped is None
    assert reason in (record.clients[1].dropped or "")
    assert "TrainReply" in (record.clients[2].dropped or "")


def test_a_second_reply_and_a_stranger_are_ignored() -> None:
    round_ = opened()
    round_.take_in("ann", reply(round_, 1.0))
    round_.take_in("ann", reply(round_, 9.0))
    round_.take_in("eve", reply(round_, 9.0))
    adapter, record = round_.close()
    assert adapter[LAYOUT.segment("b")] == pytest.approx(1.0)
    assert [client.id for client in record.clients] == NAMES


def test_too_few_survivors_leave_the_adapter_as_it_was() -> None:
    round_ = opened(1, "federation.minimum_clients=2")
    round_.take_in("ann", reply(round_, 1.0))
    round_.give_up("bob", "gone")
    adapter, record = round_.close()
    assert adapter.tobytes() == round_.adapter.tobytes()
    assert record.aborted == "1 of 3 clients survived; at least 2 must"
    assert [client.dropped for client in record.clients] == [None, "gone", LATE]


def test_a_client_cannot_weigh_more_than_the_cap() -> None:
    round_ = opened(1, "federation.weight_cap=10")
    round_.take_in("ann", reply(round_, 1.0, examples=10))
    round_.take_in("bob", reply(round_, 3.0, examples=10**9))
    assert round_.close()[0][LAYOUT.segment("b")] == pytest.approx(2.0)


def test_every_client_is_observed_once() -> None:
    seen: list[ClientRecord] = []
    round_ = TrainingRound.open(federation(), 1, LAYOUT.initial(0), NAMES, seen.append)
    round_.take_in("bob", reply(round_, 1.0))
    round_.give_up("ann", "gone")
    round_.close()
    assert [record.id for record in seen] == ["bob", "ann", "cid"]


def test_bytes_are_those_of_the_payloads() -> None:
    round_ = opened()
    payload = reply(round_, 1.0)
    round_.take_in("ann", payload)
    _, record = round_.close()
    assert record.bytes_up == len(payload)
    assert record.bytes_down == 3 * len(round_.request)


def test_the_cohort_follows_from_seed_and_round() -> None:
    names = [f"client-{index}" for index in range(50)]

    def cohort(number: int, *overrides: str) -> tuple[str, ...]:
        return TrainingRound.open(federation(*overrides), number, LAYOUT.initial(0), names).cohort

    assert cohort(1) == cohort(1)
    assert cohort(1) != cohort(2)
    assert cohort(1) != cohort(1, "training.seed=1")
    assert len(set(cohort(1))) == 10
    assert len(cohort(1, "federation.clients_per_round=0.5")) == 25
    assert len(cohort(1, "federation.clients_per_round=99")) == 50


def test_clients_evaluate_after_the_last_round_and_as_often_as_the_job_says() -> None:
    job = load_job(None, ["federation.rounds=5", "federation.evaluate_clients_every=2"])
    assert [clients_evaluate(job, number) for number in range(1, 6)] == [False, True, False, True, True]
    assert not clients_evaluate(load_job(None, ["data.holdout=0"]), 20)


def test_an_evaluation_round_keeps_scores_and_marks_the_silent() -> None:
    round_ = EvaluationRound.open(federation(), 4, LAYOUT.initial(0), NAMES)
    assert decode(round_.request, EvaluateRequest).round == 4
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


def test_a_round_does_not_touch_the_adapter_it_was_given() -> None:
    adapter: Vector = LAYOUT.initial(0)
    before = adapter.copy()
    round_ = TrainingRound.open(federation(), 1, adapter, NAMES)
    round_.take_in("ann", reply(round_, 1.0))
    round_.close()
    assert adapter.tobytes() == before.tobytes()


def test_uniform_and_token_weights_are_choices() -> None:
    job = Job()
    for weight, expected in (("uniform", 2.0), ("tokens", 2.5), ("examples", 2.5)):
        chosen = replace(federation(), job=replace(job, federation=replace(job.federation, weight=weight)))  # type: ignore[arg-type]
        round_ = TrainingRound.open(chosen, 1, LAYOUT.initial(0), NAMES)
        round_.take_in("ann", reply(round_, 1.0, examples=1))
        round_.take_in("bob", reply(round_, 3.0, examples=3))
        assert round_.close()[0][LAYOUT.segment("b")] == pytest.approx(expected)
