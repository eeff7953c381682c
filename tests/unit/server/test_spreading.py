"""The spreading of an evaluation over workers: each piece once, by whoever is free, and errors come through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import RunError
from fedtune.model.scoring import AnsweredPrompts
from fedtune.server.simulation.spreading import spread_over

ADAPTER = np.ones(3, dtype=np.float32)
PIECES = [AnsweredPrompts(((number,),)) for number in range(20)]
PATIENCE = 30.0


@contextmanager
def workers(count: int) -> Iterator[list[ThreadPoolExecutor]]:
    threads = [ThreadPoolExecutor(1) for _ in range(count)]
    try:
        yield threads
    finally:
        for thread in threads:
            thread.shutdown()


def test_each_piece_is_computed_once_and_each_worker_gets_the_adapter_once() -> None:
    asked: list[tuple[int, bool, int]] = []
    both = threading.Barrier(2)

    def ask(worker: int, adapter: Any, piece: Any) -> str:
        if adapter is not None:
            both.wait(PATIENCE)  # no worker takes all before the other begins
        asked.append((worker, adapter is not None, piece.prompts[0][0]))
        return f"answer {piece.prompts[0][0]}"

    with workers(2) as threads:
        results = dict(spread_over(threads, ask, ADAPTER, PIECES))
    assert results == {number: f"answer {number}" for number in range(20)}
    assert sorted(prompt for _, _, prompt in asked) == list(range(20))
    assert sorted(worker for worker, first, _ in asked if first) == [0, 1]


def test_a_worker_that_is_still_busy_does_not_hold_up_the_others() -> None:
    free = threading.Event()
    with workers(2) as threads:
        threads[0].submit(free.wait, PATIENCE)
        results = list(spread_over(threads, lambda worker, adapter, piece: worker, ADAPTER, PIECES))
        free.set()
    assert {worker for _, worker in results} == {1}


def test_the_first_error_ends_the_evaluation_and_waiting_pieces_never_begin() -> None:
    asked = []
    over = threading.Event()

    def ask(worker: int, adapter: Any, piece: Any) -> None:
        asked.append(piece)
        if len(asked) == 2:
            over.wait(PATIENCE)
        raise RunError("a worker ended")

    with workers(1) as threads:
        with pytest.raises(RunError, match="a worker ended"):
            list(spread_over(threads, ask, ADAPTER, PIECES))
        over.set()
    assert len(asked) <= 2
