"""The placement of a round's clients: no worker idles while a pass waits, and no client is at two workers at once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Condition
from typing import Any

import pytest

from fedtune.client.rendezvous import Answered
from fedtune.core.protocol.messages import TRAIN
from fedtune.flower.envelope import WireMessage
from fedtune.flower.in_process_grid import Outgoing
from fedtune.server.simulation.placement import Placement

OPEN = "query.open"
PATIENCE = 30.0


class Workers:
    """Two workers, which answer a message when the test says so, and at once where `held` is off."""

    def __init__(self, together: int = 1, *, held: bool = True) -> None:
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self.placement = Placement(self.threads, self._run, together)
        self.running: dict[int, tuple[int, ...]] = {}
        self.ran: list[tuple[int, tuple[int, ...]]] = []
        self._held, self._changed, self._allowed = held, Condition(), 0

    def _run(self, worker: int, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> None:
        nodes = tuple(message.node for message in messages)
        with self._changed:
            assert not {*nodes} & {node for own in self.running.values() for node in own}, "a client is at two workers"
            self.running[worker] = nodes
            self.ran.append((worker, nodes))
            self._changed.notify_all()
            if self._held:
                assert self._changed.wait_for(lambda: worker not in self.running, PATIENCE)
        if not self._held:
            time.sleep(0)
            with self._changed:
                del self.running[worker]
        answer: Any = nodes
        for index in range(len(messages)):
            answered(index, answer)

    def send(self, nodes: Sequence[int], round_number: int, action: str = TRAIN) -> list[Future[WireMessage]]:
        """Submits a message to each node."""
        return [self.placement.submit(Outgoing(action, str(round_number), node, _pack, nodes)) for node in nodes]

    def run(self, *passes: Sequence[int]) -> list[int]:
        """Waits until these passes run; returns the worker of each."""
        with self._changed:
            assert self._changed.wait_for(lambda: {*map(tuple, passes)} <= {*self.running.values()}, PATIENCE)
            return [next(at for at, own in self.running.items() if own == tuple(each)) for each in passes]

    def end(self, worker: int) -> None:
        """Lets a worker answer what it runs."""
        with self._changed:
            del self.running[worker]
            self._changed.notify_all()

    def release(self) -> None:
        """Lets all workers answer whatever comes."""
        with self._changed:
            self._held = False
            self.running.clear()
            self._changed.notify_all()


def _pack() -> WireMessage:
    raise AssertionError("nothing is packed here")


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    shut(made)


def shut(workers: Workers) -> None:
    workers.placement.close()
    for thread in workers.threads:
        thread.shutdown(wait=False, cancel_futures=True)
    workers.release()
    for thread in workers.threads:
        thread.shutdown()


def test_a_free_worker_takes_the_client_that_has_waited_longest(workers: Workers) -> None:
    futures = workers.send([1, 2, 3, 4, 5], 1)
    first, second = workers.run([1], [2])
    assert first != second
    assert [workers.placement.place(node) for node in (3, 4, 5)] == [None] * 3
    for node in (3, 4, 5):
        workers.end(second)
        assert workers.run([node]) == [second]
    workers.end(second)
    wait(futures[1:], PATIENCE)
    assert [future.done() for future in futures] == [False, True, True, True, True]


def test_a_client_stays_for_its_round_and_a_late_one_where_it_is(workers: Workers) -> None:
    workers.send([1, 2], 1)
    late, free = workers.run([1], [2])
    workers.end(free)
    workers.send([2], 1, OPEN)
    assert workers.run([2]) == [free]
    workers.end(free)
    again = workers.send([1, 3], 2)
    assert workers.run([3]) == [free], "the other worker's thread is still busy with round 1"
    assert workers.placement.place(1) == late
    workers.end(late)
    assert workers.run([1]) == [late]
    workers.release()
    wait(again, PATIENCE)


def test_clients_that_still_wait_when_a_round_begins_are_never_at_two_workers(workers: Workers) -> None:
    futures = workers.send([1, 2, 3, 4], 1)
    workers.run([1], [2])
    places = []
    for number in (2, 3):
        futures += workers.send([4, 3, 5], number)
        places.append([workers.placement.place(node) for node in (1, 2, 3, 4)])
    assert None not in places[0]
    assert places[0] == places[1]
    workers.release()
    assert not wait(futures, PATIENCE).not_done
    assert {(at, own[0]) for at, own in workers.ran if own[0] in (3, 4)} == {(places[0][2], 3), (places[0][3], 4)}


def test_those_who_are_asked_for_something_else_first_are_spread_evenly_and_train_where_they_are(
    workers: Workers,
) -> None:
    workers.release()
    wait(workers.send(range(1, 9), 1, OPEN), PATIENCE)
    opened = [workers.placement.place(node) for node in range(1, 9)]
    assert opened == [0, 1] * 4
    wait(workers.send(range(1, 9), 1), PATIENCE)
    assert sorted(workers.ran[8:], key=lambda each: each[1]) == [(at, (node,)) for node, at in enumerate(opened, 1)]


def test_a_block_has_one_worker_whatever_it_is_asked_first() -> None:
    workers = Workers(together=2)
    try:
        workers.send([1, 2, 3, 4, 5, 6], 1)
        first, _ = workers.run([1, 2], [3, 4])
        assert [workers.placement.place(node) for node in (1, 2, 5, 6)] == [first, first, None, None]
        workers.send([5], 1, OPEN)
        assert workers.placement.place(6) == workers.placement.place(5) is not None, "one of the two cannot be alone"
        workers.release()
        wait(workers.send([5, 6], 1), PATIENCE)
        assert {at for at, own in workers.ran if {*own} & {5, 6}} == {workers.placement.place(5)}
    finally:
        shut(workers)


def test_no_answer_is_lost_and_no_client_at_two_workers_whatever_comes_when() -> None:
    draw = random.Random(18)
    for _ in range(30):
        workers = Workers(together=draw.choice([1, 2, 3]), held=False)
        futures = []
        for number in range(1, 5):
            nodes = draw.sample(range(12), 8)
            for action in draw.choice([[TRAIN], [OPEN, TRAIN], [TRAIN, TRAIN], [TRAIN, OPEN]]):
                asked = [node for node in nodes if draw.random() < 0.8]
                futures += workers.send(asked, number, action)
                if draw.random() < 0.5:
                    wait(futures, PATIENCE)
        assert not wait(futures, PATIENCE).not_done
        assert all(future.exception() is None for future in futures)
        shut(workers)


def test_an_error_reaches_the_pass_and_the_worker_goes_on() -> None:
    calls = []

    def fail_once(worker: int, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> None:
        calls.append(worker)
        if len(calls) == 1:
            raise RuntimeError("ended")
        answer: Any = "there"
        answered(0, answer)

    with ThreadPoolExecutor(1) as thread:
        placement = Placement([thread], fail_once)
        futures = [placement.submit(Outgoing(TRAIN, "1", node, _pack, [1, 2])) for node in (1, 2)]
        assert str(futures[0].exception(PATIENCE)) == "ended"
        answered: Any = futures[1].result(PATIENCE)
        assert answered == "there"


def test_what_still_waits_is_cancelled_when_the_workers_are_closed(workers: Workers) -> None:
    futures = workers.send([1, 2, 3, 4], 1)
    workers.run([1], [2])
    futures += workers.send([2, 5], 2)
    shut(workers)
    assert [future.cancelled() for future in futures] == [False, False, True, True, True, True]
