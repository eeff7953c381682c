"""The spreading of pieces of an evaluation over workers, of which each has a thread that waits for its answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from typing import Any

from fedtune.core.adapter.layout import Vector
from fedtune.core.spans import span
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.scoring import Piece

Ask = Callable[[int, Vector | None, Piece[Any]], Any]
"""(worker, adapter, piece) -> the result; an adapter of None is the one that this worker was given last."""


def compute_piece(model: AdaptedModel, adapter: Vector | None, piece: Piece[Any]) -> Any:
    """Returns the result of a piece, for this adapter, or for the one that the model holds."""
    if adapter is not None:
        with span("receiving the adapter"):
            model.load(adapter)
    return piece.compute(model)


def spread_over(
    threads: Sequence[Executor], ask: Ask, adapter: Vector, pieces: Sequence[Piece[Any]]
) -> Iterator[tuple[int, Any]]:
    """Yields the index and the result of each piece as it is done; a worker that is free takes the next piece.

    A worker that still has other work begins after that, and the others do its share meanwhile.

    Args:
        threads: each worker's own thread.
        ask: has a piece computed by a worker, on the worker's thread.

    Raises:
        Exception: the first error of any piece.
    """
    indices: dict[Future[Any], int] = {Future(): index for index in range(len(pieces))}
    waiting = deque(indices.items())

    def work(worker: int) -> None:
        carried: Vector | None = adapter
        while waiting:
            try:
                future, index = waiting.popleft()
            except IndexError:  # another worker took the last one
                return
            try:
                future.set_result(ask(worker, carried, pieces[index]))
            except Exception as error:
                future.set_exception(error)
            carried = None

    for worker, thread in enumerate(threads):
        thread.submit(work, worker)
    try:
        for future in as_completed(indices):
            yield indices[future], future.result()
    finally:
        waiting.clear()
