"""The passes of a simulation: blocks of a round's clients, whatever workers there are, and the number in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from fedtune.client.plan.machine import probe
from fedtune.client.rendezvous import Answered
from fedtune.core.errors import JobError, RunError
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.messages import TRAIN
from fedtune.flower.envelope import WireMessage
from fedtune.flower.in_process_grid import Outgoing
from fedtune.server.simulation.passes import Blocks, Passes, evenly
from fedtune.server.simulation.simulated_run import clients_together
from fedtune.server.simulation.stock_flower import _job

GIB = 1 << 30
SMALL_STEPS = ("training.batch_tokens=64", "data.sequence_length=64", "simulation.together=auto")


def outgoing(node: int, beside: Sequence[int], group: str = "1", action: str = TRAIN) -> Outgoing:
    def pack() -> WireMessage:
        raise AssertionError("nothing is packed here")

    return Outgoing(action, group, node, pack, beside)


class Started:
    """Keeps the nodes of each pass that is started, what is told of its answers, and its end."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.answered: list[Answered[WireMessage]] = []
        self.ends: list[Future[None]] = []

    def __call__(self, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> Future[None]:
        self.passes.append([message.node for message in messages])
        self.answered.append(answered)
        self.ends.append(Future())
        return self.ends[-1]


def submit(passes: Passes, started: Started, messages: Sequence[Outgoing], worker_of: Any = lambda _: 0) -> list[Any]:
    return [passes.submit(message, worker_of, started) for message in messages]


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(10, 4, [3, 3, 4]), (10, 8, [5, 5]), (3, 8, [3]), (4, 1, [1] * 4), (0, 4, [])]
)
def test_nodes_are_cut_into_the_fewest_runs_of_almost_equal_sizes(count: int, most: int, sizes: list[int]) -> None:
    runs = evenly(range(count), most)
    assert [len(run) for run in runs] == sizes
    assert [node for run in runs for node in run] == list(range(count))


def test_a_block_stays_together_for_its_round_and_new_nodes_get_blocks_of_their_own() -> None:
    blocks = Blocks(2)
    assert blocks.of(outgoing(1, [1, 2, 3, 4])) == (1, 2)
    assert blocks.of(outgoing(4, [2, 4])) == (3, 4)
    assert blocks.of(outgoing(9, [9, 1, 8])) == (9, 8)
    assert blocks.of(outgoing(2, [2, 4], group="2")) == (2, 4)


def test_a_pass_starts_with_its_last_message_and_each_future_gets_its_own_answer() -> None:
    passes, started = Passes(2), Started()
    futures = submit(passes, started, [outgoing(node, [1, 2, 3, 4]) for node in (1, 3)])
    assert started.passes == []
    futures += submit(passes, started, [outgoing(node, [1, 2, 3, 4]) for node in (4, 2)])
    assert started.passes == [[3, 4], [1, 2]]
    answer: Any = object()
    started.answered[0](1, ValueError("four"))
    assert [future.done() for future in futures] == [False, False, True, False]
    started.answered[0](0, answer)
    started.ends[0].set_result(None)
    started.answered[1](1, answer)
    started.ends[1].set_exception(RuntimeError("ended"))
    assert futures[1].result() is answer
    assert futures[3].result() is answer
    assert [str(futures[index].exception()) for index in (0, 2)] == ["ended", "four"]


def test_a_pass_that_ends_without_an_answer_is_an_error_and_never_no_answer() -> None:
    passes, started = Passes(2), Started()
    futures = submit(passes, started, [outgoing(node, [1, 2]) for node in (1, 2)])
    answer: Any = object()
    started.answered[0](0, answer)
    started.ends[0].set_result(None)
    assert futures[0].result() is answer
    with pytest.raises(RunError, match="without the answer"):
        futures[1].result(0)


def test_messages_that_ask_for_no_training_are_never_held_back() -> None:
    passes, started = Passes(4), Started()
    submit(passes, started, [outgoing(node, [1, 2], action="query.open") for node in (1, 2)])
    assert started.passes == [[1], [2]]


def test_a_block_that_lost_a_client_is_not_filled_up() -> None:
    """A fork has its clients since the round's first message, and the cut must not depend on forks."""
    passes, started = Passes(2), Started()
    submit(passes, started, [outgoing(node, [1, 2, 3, 4], action="query.open") for node in (1, 2, 3, 4)])
    started.passes.clear()
    submit(passes, started, [outgoing(node, [1, 2, 4]) for node in (1, 2, 4)])
    assert started.passes == [[1, 2], [4]]


def test_only_members_that_are_asked_and_on_the_same_worker_are_waited_for() -> None:
    passes, started = Passes(4), Started()
    submit(passes, started, [outgoing(node, [1, 2, 3, 4], action="query.open") for node in (1, 2, 3, 4)])
    started.passes.clear()
    submit(passes, started, [outgoing(node, [1, 3, 4]) for node in (1, 3, 4)], lambda node: int(node == 4))
    assert started.passes == [[1, 3], [4]]


def test_a_cancelled_pass_cancels_the_answers_of_all() -> None:
    passes, started = Passes(2), Started()
    futures = submit(passes, started, [outgoing(node, [1, 2]) for node in (1, 2)])
    started.ends[0].cancel()
    started.ends[0].set_running_or_notify_cancel()
    assert all(future.cancelled() for future in futures)


def together(*overrides: str, cores: float = 2.0, memory_free: int = 64 * GIB) -> int:
    machine = dataclasses.replace(probe(), cores=cores, memory_free=memory_free)
    return clients_together(load_job(None, [*SMALL_STEPS, *overrides]), 100, lambda: machine)


def test_auto_takes_as_many_clients_as_memory_the_cohort_and_the_size_of_steps_allow() -> None:
    many = ("federation.clients_per_round=40",)
    assert together(*many) == 8
    assert together("federation.clients_per_round=10") == 3
    assert together(*many, "simulation.workers=10") == 2
    assert together(*many, "training.batch_tokens=256") == 2
    assert together(*many, "training.batch_tokens=4096") == 1
    assert 1 <= together(*many, memory_free=GIB // 4) < 8
    assert together(*many, memory_free=0) == 1
    assert together("simulation.backend=ray") == 1
    assert together("simulation.together=3", memory_free=0) == 3


def test_ray_and_stock_flower_refuse_what_they_cannot_do() -> None:
    with pytest.raises(JobError, match=r"simulation\.together is 2, but simulation\.backend is"):
        load_job(None, ["simulation.together=2", "simulation.backend=ray"])
    for wrong in ("0", "-1", "5000", "1.5", "some"):
        with pytest.raises(JobError, match=r"simulation\.together"):
            load_job(None, [f"simulation.together={wrong}"])
    with pytest.raises(JobError, match="Flower's engine gives out one message at a time"):
        _job({"set": "simulation.together=2 secure_aggregation.enabled=false"})
