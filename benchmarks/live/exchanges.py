"""What is measured on both sides: messages out, echoes back, over whatever grid; and the app that echoes.

    seconds = measure(grid, nodes, workloads(len(nodes)))

A stock Flower app is made of this file, so it needs Flower and numpy alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

PATIENCE_SECONDS = 600.0
MEGABYTES = 8
TRIVIAL, LARGE, ROUND = "trivial", f"{MEGABYTES} MB both ways", "a secure round's five"

# Bytes to and from each client in the exchanges of one secure round of the demo, as its rounds.jsonl has them.
SECURE_ROUND = ((26_219, 183), (331, 237), (331, 49_740), (49, 106), (175, 140))

app = ClientApp()


@dataclass(frozen=True)
class Workload:
    """Exchanges one after the other; each is a message to every client and its echo.

    Args:
        sizes: bytes to and from each client, an exchange each.
        repetitions: of the whole.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    repetitions: int


def workloads(clients: int) -> list[Workload]:
    """What is measured with so many clients."""
    large = MEGABYTES * 1_000_000
    few = [Workload(TRIVIAL, ((1, 1),), 5), Workload(LARGE, ((large, large),), 3)] if clients == 2 else []
    return [*few, Workload(ROUND, SECURE_ROUND, 2)]


def measure(grid: Grid, nodes: Sequence[int], planned: Sequence[Workload]) -> dict[str, list[float]]:
    """Seconds of every repetition, by workload.

    Raises:
        RuntimeError: a client did not echo.
    """
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    for workload in planned:
        for _ in range(workload.repetitions):
            began = time.perf_counter()
            for down, up in workload.sizes:
                _exchange(grid, [Message(_content(random, down, up), node, "query", ttl=3600) for node in nodes], up)
            seconds.setdefault(workload.name, []).append(time.perf_counter() - began)
    return seconds


@app.query()
def echo(message: Message, context: Context) -> Message:
    """As many bytes as were asked for."""
    del context
    size = message.content["wanted"]["bytes"]
    assert isinstance(size, int)
    return Message(_content(np.random.default_rng(), size, 0), reply_to=message)


def _exchange(grid: Grid, messages: Sequence[Message], up: int) -> None:
    replies = list(grid.send_and_receive(messages, timeout=PATIENCE_SECONDS))
    arrived = [
        0 if reply.has_error() else reply.content.array_records["payload"]["x"].numpy().size for reply in replies
    ]
    if arrived != [up] * len(messages):
        raise RuntimeError(f"expected {up} bytes from {len(messages)} clients, got {arrived}")


def _content(random: np.random.Generator, size: int, wanted: int) -> RecordDict:
    payload = ArrayRecord({"x": Array(random.integers(0, 256, size, dtype=np.uint8))})
    return RecordDict({"payload": payload, "wanted": ConfigRecord({"bytes": wanted})})
