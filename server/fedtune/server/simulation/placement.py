"""The placement of a round's clients on workers, of which each has a thread that waits for its answers.

    placement = Placement(threads, run, together=4)     # run(worker, [messages of one pass], answered), on its thread
    future = placement.submit(message)

A client stays at its worker for the round, where its secrets are, and longer while it is busy, so that no client works
at two workers at once. Those of a block have one worker. A block whose first message of a round asks to train goes to
the first worker that is free, so that none is idle while a pass waits; any other, at once to that with the fewest
clients, for who is free then says nothing of the training that follows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import RLock

from fedtune.client.rendezvous import Answered
from fedtune.core.protocol.messages import TRAIN
from fedtune.flower.envelope import WireMessage
from fedtune.flower.in_process_grid import Outgoing
from fedtune.server.simulation.passes import Passes

Run = Callable[[int, Sequence[Outgoing], Answered[WireMessage]], None]
"""(worker, messages of one pass, told of each answer): returns when all were told."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A pass that waits for a worker; `done` ends with it."""

    messages: Sequence[Outgoing]
    answered: Answered[WireMessage]
    done: Future[None]


class Placement:
    """Hands messages to workers.

    Args:
        threads: each worker's own thread.
        run: has a worker answer the messages of one pass, on the worker's thread.
        together: K, the most clients in a pass.
    """

    def __init__(self, threads: Sequence[Executor], run: Run, together: int = 1) -> None:
        self._threads, self._run = threads, run
        self._passes = Passes(together)
        self._lock = RLock()
        self._round = ""
        self._places: dict[int, int] = {}
        self._latest: dict[int, Future[WireMessage]] = {}
        self._waiting: deque[_Waiting] = deque()
        self._asked: set[int] = set()  # the workers that will take a pass when they are free

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        """Queues the message for its client's worker."""
        with self._lock:
            if message.group != self._round:
                self._begin_round(message.group)
            block = self._passes.blocks.of(message)
            if message.action != TRAIN or any(node in self._places for node in block):
                self._place(block)
            self._latest[message.node] = self._passes.submit(message, self.place, self._start)
            return self._latest[message.node]

    def place(self, node: int) -> int | None:
        """Returns the worker of a client that has work in this round; None while it waits for one."""
        return self._places.get(node)

    def close(self) -> None:
        """Drops the passes that still wait for a worker."""
        with self._lock:
            for each in self._waiting:
                each.done.cancel()
            self._waiting.clear()

    def _begin_round(self, group: str) -> None:
        """Forgets the clients that have answered; the others keep their worker, or get one now."""
        self._round = group
        while self._waiting:
            self._place(self._passes.blocks.of(self._waiting[0].messages[0]))
        self._latest = {node: future for node, future in self._latest.items() if not future.done()}
        self._places = {node: place for node, place in self._places.items() if node in self._latest}

    def _start(self, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> Future[None]:
        """Has a pass begun by its clients' worker, or by the first that is free."""
        each = _Waiting(messages, answered, Future())
        place = self.place(messages[0].node)
        if place is not None:
            self._hand(place, each)
        else:
            self._waiting.append(each)
            for worker in range(len(self._threads)):
                self._ask(worker)
        return each.done

    def _ask(self, worker: int) -> None:
        if worker not in self._asked:
            self._asked.add(worker)
            self._threads[worker].submit(self._take, worker)

    def _take(self, worker: int) -> None:
        """Gives a free worker the pass that has waited longest, unless others have taken all."""
        with self._lock:
            self._asked.discard(worker)
            if not self._waiting:
                return
            each = self._waiting.popleft()
            self._place(self._passes.blocks.of(each.messages[0]), worker)
            if self._waiting:
                self._ask(worker)
        self._answer(worker, each)

    def _place(self, nodes: Sequence[int], worker: int | None = None) -> None:
        """Places those clients that have no worker yet, and hands it the passes of theirs that wait.

        All of a block or none have a worker, so that a pass has the same members for each of its messages.

        Args:
            worker: by default that with the fewest clients.
        """
        if worker is None:
            load = Counter(self._places.values())
            worker = min(range(len(self._threads)), key=lambda each: load[each])
        new = {node for node in nodes if node not in self._places}
        self._places.update(dict.fromkeys(new, worker))
        for each in [each for each in self._waiting if each.messages[0].node in new]:
            self._waiting.remove(each)
            self._hand(worker, each)

    def _hand(self, worker: int, each: _Waiting) -> None:
        self._threads[worker].submit(self._answer, worker, each).add_done_callback(lambda handed: _drop(handed, each))

    def _answer(self, worker: int, each: _Waiting) -> None:
        try:
            self._run(worker, each.messages, each.answered)
        except BaseException as error:  # whatever it is, the pass is over, and the server waits for it
            each.done.set_exception(error)
        else:
            each.done.set_result(None)


def _drop(handed: Future[None], each: _Waiting) -> None:
    """Cancels a pass whose worker's thread has dropped it."""
    if handed.cancelled():
        each.done.cancel()
