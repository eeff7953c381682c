"""Calls that train at once are trained together, in their order, and nothing that one does holds up the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from local_tasks import local_task
from numpy_trainer import NumpyTrainer

from fedtune.client.rendezvous import Rendezvous, one_by_one
from fedtune.client.torch import joint_training
from fedtune.client.torch.joint_training import JointTraining
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import ClientTask, LocalResult, LocalTask, Outcome
from fedtune.core.errors import UpdateError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import load_base
from fedtune.model.side_by_side_layers import MixedRowsError

ZEROS = np.zeros(3, dtype=np.float32)


def result(number: int) -> LocalResult:
    return LocalResult(ZEROS, number, 1, 0.0, 1, 1, 0.0)


class Recorder:
    """Trains nothing; keeps the seeds of the tasks that were asked for together, and the threads that asked."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.threads: list[int] = []

    def __call__(self, tasks: Sequence[ClientTask]) -> list[Outcome]:
        self.passes.append([each.task.seed for each in tasks])
        self.threads.append(threading.get_ident())
        return [UpdateError("seven") if each.task.seed == 7 else result(each.task.seed) for each in tasks]


class Seeded(NumpyTrainer):
    """Trains nothing; its results have the tasks' seeds."""

    def train(self, examples: Any, received: Any, task: LocalTask) -> LocalResult:
        if task.seed == 7:
            raise UpdateError("seven")
        return result(task.seed)


def task(seed: int, steps: int = 1) -> ClientTask:
    return ClientTask([], ZEROS, local_task(seed, local_steps=steps, learning_rate=0.1))


def answers_of(trainer: Rendezvous, calls: Sequence[Callable[[], int]]) -> list[int | Exception]:
    answers: dict[int, int | Exception] = {}
    trainer.run(calls, answers.__setitem__)
    return [answers[index] for index in range(len(calls))]


def train_call(trainer: Rendezvous, seed: int) -> Callable[[], int]:
    return lambda: trainer.train([], ZEROS, task(seed).task).examples


def test_calls_train_together_in_their_order_and_in_the_callers_thread() -> None:
    recorder = Recorder()
    trainer = Rendezvous(NumpyTrainer(), recorder)
    assert answers_of(trainer, [train_call(trainer, seed) for seed in (5, 3, 4)]) == [5, 3, 4]
    assert recorder.passes == [[5, 3, 4]]
    assert recorder.threads == [threading.get_ident()]


def test_a_call_that_fails_or_never_trains_does_not_hold_up_the_others() -> None:
    recorder = Recorder()
    trainer = Rendezvous(NumpyTrainer(), recorder)

    def fail() -> int:
        raise ConnectionError("vanished")

    failed, idle, trained, astray = answers_of(
        trainer, [fail, lambda: 0, train_call(trainer, 1), train_call(trainer, 7)]
    )
    assert isinstance(failed, ConnectionError)
    assert (idle, trained, str(astray)) == (0, 1, "seven")
    assert recorder.passes == [[1, 7]]


def test_one_call_runs_at_a_time() -> None:
    """msgspec, for one, prepares a type at its first use, and two threads that do so at once may crash."""
    trainer = Rendezvous(NumpyTrainer(), Recorder())
    running = threading.Lock()

    def call(seed: int) -> int:
        for _ in range(2):
            assert running.acquire(blocking=False)
            time.sleep(0.01)
            running.release()
            train_call(trainer, seed)()
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        running.release()
        return seed

    assert answers_of(trainer, [partial(call, seed) for seed in range(4)]) == [0, 1, 2, 3]


def test_a_call_may_train_twice() -> None:
    recorder = Recorder()
    trainer = Rendezvous(NumpyTrainer(), recorder)

    def twice() -> int:
        return train_call(trainer, 1)() + train_call(trainer, 2)()

    assert answers_of(trainer, [twice, train_call(trainer, 3)]) == [3, 3]
    assert recorder.passes == [[1, 3], [2]]


def test_an_error_of_the_training_reaches_every_call() -> None:
    def broken(tasks: Sequence[ClientTask]) -> list[Outcome]:
        raise RuntimeError("broken")

    trainer = Rendezvous(NumpyTrainer(), broken)
    answers = answers_of(trainer, [train_call(trainer, seed) for seed in (1, 2)])
    assert [str(each) for each in answers] == ["broken", "broken"]


def test_an_answer_is_told_before_the_next_call_goes_on() -> None:
    trainer, told = Rendezvous(NumpyTrainer(), Recorder()), list[str]()

    def call(seed: int) -> int:
        train_call(trainer, seed)()
        told.append(f"call {seed} ends")
        return seed

    trainer.run([partial(call, seed) for seed in (1, 2)], lambda index, answer: told.append(f"{index}: {answer}"))
    assert told == ["call 1 ends", "0: 1", "call 2 ends", "1: 2"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_no_ordinary_error_does_not_hold_up_the_others() -> None:
    trainer = Rendezvous(NumpyTrainer(), Recorder())

    def panic() -> int:
        raise BaseException("a panic of a compiled library")

    answers: dict[int, int | Exception] = {}
    trainer.run([panic, train_call(trainer, 1)], answers.__setitem__)
    assert answers == {1: 1}


def test_outside_a_run_the_single_trainer_trains() -> None:
    recorder, single = Recorder(), Seeded()
    trainer = Rendezvous(single, recorder)
    assert train_call(trainer, 4)() == 4
    assert recorder.passes == []
    assert (trainer.digest, trainer.name, trainer.layout) == (single.digest, single.name, single.layout)


def test_one_by_one_keeps_the_errors_of_single_clients() -> None:
    outcomes = one_by_one(Seeded())([task(seed) for seed in (1, 7, 2)])
    assert [each.examples if isinstance(each, LocalResult) else str(each) for each in outcomes] == [1, "seven", 2]


@pytest.fixture(scope="module")
def torch_trainer() -> TorchTrainer:
    return TorchTrainer(adapt(load_base(ModelSettings(), precision="fp32"), AdapterSettings(rank=4)))


def tasks(*steps: int) -> list[ClientTask]:
    return [task(seed, count) for seed, count in enumerate(steps)]


def passes_of(
    trainer: TorchTrainer,
    monkeypatch: pytest.MonkeyPatch,
    asked: Sequence[ClientTask],
    most: int,
    fail: Callable[[int], Exception | None] = lambda _: None,
) -> tuple[list[list[int]], list[str]]:
    """Returns the seeds of each pass that was computed, one client alone included, and the notes."""
    passes: list[list[int]] = []
    notes: list[str] = []

    def together(_: object, part: Sequence[ClientTask]) -> list[Outcome]:
        if error := fail(len(part)):
            raise error
        return record(part)

    def record(part: Sequence[ClientTask]) -> list[Outcome]:
        passes.append([each.task.seed for each in part])
        return [result(each.task.seed) for each in part]

    monkeypatch.setattr(joint_training, "train_together", together)
    monkeypatch.setattr(joint_training, "outcome_of", lambda _, each: record([each])[0])
    outcomes = JointTraining(trainer, most, notes.append)(asked)
    assert [each.examples for each in outcomes if isinstance(each, LocalResult)] == list(range(len(asked)))
    return passes, notes


def test_tasks_of_different_work_are_in_passes_of_their_own(
    torch_trainer: TorchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, notes = passes_of(torch_trainer, monkeypatch, tasks(2, 1, 2, 2, 1, 2), most=3)
    assert passes == [[0, 2, 3], [5], [1, 4]]
    assert notes == []


def test_where_memory_runs_out_passes_are_halved_once_and_then_clients_train_alone(
    torch_trainer: TorchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(limit: int) -> Callable[[int], Exception | None]:
        return lambda count: RuntimeError("can't allocate memory") if count > limit else None

    passes, notes = passes_of(torch_trainer, monkeypatch, tasks(*[1] * 8), 8, over(4))
    assert passes == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert notes == ["memory ran out with 8 clients in a pass; it has 4 from now on"]
    passes, notes = passes_of(torch_trainer, monkeypatch, tasks(*[1] * 4), 4, over(1))
    assert passes == [[0], [1], [2], [3]]
    assert len(notes) == 2
    assert "one after another" in notes[1]
    with pytest.raises(RuntimeError, match="another reason"):
        passes_of(torch_trainer, monkeypatch, tasks(1, 1), 2, lambda _: RuntimeError("another reason"))


def test_an_architecture_that_mixes_rows_trains_clients_alone_and_says_so_once(
    torch_trainer: TorchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, notes = passes_of(torch_trainer, monkeypatch, tasks(1, 1, 1), 3, lambda _: MixedRowsError("mixed"))
    assert passes == [[0], [1], [2]]
    assert notes == ["clients train one after another, whatever simulation.together says: mixed"]
