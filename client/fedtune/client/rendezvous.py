"""A rendezvous of clients: a trainer that several clients ask at once, and that then trains them in one pass.

    trainer = Rendezvous(TorchTrainer(model), train_all)
    device = Device(lambda base: trainer, ..., turns=nullcontext())
    trainer.run([partial(handler, client, request) for client, request in asked], answered)

Each call of `run` has a thread of its own, of which one runs at a time: a call goes on until it waits in `train` or
ends, and then the next one does, so that nothing besides the trainer need expect several at once. The tasks of those
that wait are then trained by `train_all`, in the caller's thread and in the order of the calls, and the calls go on. So
a client's handler needs to know nothing of the others, and its answer stays its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from fedtune.client.trainer import ClientTask, LocalResult, LocalTask, Outcome, Trainer
from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.errors import UpdateError
from fedtune.core.round_records import Evaluation
from fedtune.core.spans import span
from fedtune.data.examples import Example
from fedtune.data.tokenizer import Tokenizer

Answer = TypeVar("Answer")
Answered = Callable[[int, Answer | Exception], None]
"""(index of a call, its answer or the error that it raised): told as soon as the call has ended."""

TrainAll = Callable[[Sequence[ClientTask]], Sequence[Outcome]]
"""Trains the tasks; returns an outcome for each."""

_Ask = Callable[[ClientTask], Outcome]
_ask: ContextVar[_Ask | None] = ContextVar("ask", default=None)


def one_by_one(trainer: Trainer) -> TrainAll:
    """Returns a function that has a trainer train one task after another."""

    def train_all(tasks: Sequence[ClientTask]) -> list[Outcome]:
        return [outcome_of(trainer, each) for each in tasks]

    return train_all


def outcome_of(trainer: Trainer, task: ClientTask) -> Outcome:
    """Has a trainer train one task."""
    try:
        return trainer.train(task.examples, task.received, task.task)
    except UpdateError as error:
        return error


class Rendezvous:
    """Trains the tasks of the calls of `run` together; a trainer like any other outside them.

    Args:
        trainer: trains the other tasks, and scores adapters.
        train_all: trains tasks together.
    """

    def __init__(self, trainer: Trainer, train_all: TrainAll) -> None:
        self._trainer, self._train_all = trainer, train_all

    @property
    def layout(self) -> AdapterLayout:
        """The adapter's."""
        return self._trainer.layout

    @property
    def digest(self) -> str:
        """The base model's."""
        return self._trainer.digest

    @property
    def name(self) -> str:
        """The base model's directory or hub id."""
        return self._trainer.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's."""
        return self._trainer.tokenizer

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        """Trains with the other calls of the same `run`, or alone outside of one.

        Raises:
            UpdateError: training gave no update that may be sent.
        """
        ask = _ask.get()
        if ask is None:
            with span("training"):
                return self._trainer.train(examples, received, task)
        with span("training with others", waits=True):
            outcome = ask(ClientTask(examples, received, task))
        if isinstance(outcome, UpdateError):
            raise outcome
        return outcome

    def evaluate(self, adapter: Vector, examples: Sequence[Example]) -> Evaluation:
        """Scores an adapter."""
        return self._trainer.evaluate(adapter, examples)

    def run(self, calls: Sequence[Callable[[], Answer]], answered: Answered[Answer]) -> None:
        """Runs all calls to their end, and tells `answered` of each.

        Args:
            answered: called in the call's thread, before the next call goes on.
        """
        with span("pass", waits=True):
            _Meeting(calls, self._train_all, answered).run()


class _Meeting(Generic[Answer]):
    """The calls of one `run`, of which one runs at a time."""

    def __init__(self, calls: Sequence[Callable[[], Answer]], train_all: TrainAll, answered: Answered[Answer]) -> None:
        self._calls, self._train_all, self._answered = calls, train_all, answered
        self._asked: dict[int, tuple[ClientTask, Future[Outcome]]] = {}
        self._paused: SimpleQueue[None] = SimpleQueue()  # an item each time a call ends or begins to wait

    def run(self) -> None:
        threads = [
            Thread(target=self._call, args=(index, call), name=f"client-{index}", daemon=True)
            for index, call in enumerate(self._calls)
        ]
        for thread in threads:
            thread.start()
            self._paused.get()
        while self._asked:
            self._train()
        for thread in threads:
            thread.join()

    def _call(self, index: int, call: Callable[[], Answer]) -> None:
        def ask(task: ClientTask) -> Outcome:
            future: Future[Outcome] = Future()
            self._asked[index] = (task, future)
            self._paused.put(None)
            return future.result()

        _ask.set(ask)  # this thread's own
        try:
            answer: Answer | Exception
            try:
                answer = call()
            except Exception as error:  # a handler may raise any type
                answer = error
            self._answered(index, answer)
        finally:  # whatever has ended the thread, the others go on
            self._paused.put(None)

    def _train(self) -> None:
        """Trains the tasks of all calls that wait, and lets one after another of these go on."""
        waiting = [self._asked[index] for index in sorted(self._asked)]
        self._asked = {}
        outcomes: Sequence[Outcome] | Exception
        try:
            with span("training"):
                outcomes = self._train_all([task for task, _ in waiting])
        except Exception as error:  # which every call raises
            outcomes = error
        for index, (_, future) in enumerate(waiting):
            if isinstance(outcomes, Exception):
                future.set_exception(outcomes)
            else:
                future.set_result(outcomes[index])
            self._paused.get()
