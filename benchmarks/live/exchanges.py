"""The measurement for both contestants, messages out and echoes back over any grid; and the app that echoes.

    seconds = measure(grid, nodes, workloads(len(nodes)))

A stock Flower app consists of this file, so it needs only Flower and numpy.
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
SHORT_BYTES = 4096  # payloads up to here travel as one object, as in fedtune
LENGTH_BYTES = 8  # at the beginning of a question: the number of bytes wanted back
MEGABYTES = 8
TRIVIAL, LARGE, ROUND = "trivial", f"{MEGABYTES} MB both ways", "a secure round's five"

# Bytes to and from each client in the exchanges of one secure round of the demo, from its rounds.jsonl.
SECURE_ROUND = ((26_219, 183), (331, 237), (331, 49_740), (49, 106), (175, 140))

app = ClientApp()


@dataclass(frozen=True)
class Workload:
    """A sequence of exchanges, each of which is a message to every client and its echo.

    Args:
        sizes: bytes to and from each client, one pair an exchange.
        repetitions: how often the whole sequence is repeated.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    repetitions: int


def workloads(clients: int) -> list[Workload]:
    """Returns the workloads for this number of clients."""
    large = MEGABYTES * 1_000_000
    few = [Workload(TRIVIAL, ((1, 1),), 5), Workload(LARGE, ((large, large),), 3)] if clients == 2 else []
    return [*few, Workload(ROUND, SECURE_ROUND, 2)]


def measure(grid: Grid, nodes: Sequence[int], planned: Sequence[Workload]) -> dict[str, list[float]]:
    """Measures the seconds of every repetition, by workload.

    Raises:
        RuntimeError: a client did not echo.
    """
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    for workload in planned:
        for _ in range(workload.repetitions):
            began = time.perf_counter()
            for down, up in workload.sizes:
                questions = [up.to_bytes(LENGTH_BYTES) + random.bytes(max(0, down - LENGTH_BYTES)) for _ in nodes]
                messages = [
                    Message(_content(question), node, "query", ttl=3600)
                    for question, node in zip(questions, nodes, strict=True)
                ]
                _exchange(grid, messages, up)
            seconds.setdefault(workload.name, []).append(time.perf_counter() - began)
    return seconds


def echoed(question: bytes) -> bytes:
    """Returns as many bytes as the question wants."""
    return np.random.default_rng().bytes(int.from_bytes(question[:LENGTH_BYTES]))


@app.query()
def echo(message: Message, context: Context) -> Message:
    """Answers a question in a stock Flower app."""
    del context
    return Message(_content(echoed(_payload(message))), reply_to=message)


def _exchange(grid: Grid, messages: Sequence[Message], up: int) -> None:
    replies = list(grid.send_and_receive(messages, timeout=PATIENCE_SECONDS))
    arrived = [0 if reply.has_error() else len(_payload(reply)) for reply in replies]
    if arrived != [up] * len(messages):
        raise RuntimeError(f"expected {up} bytes from {len(messages)} clients, got {arrived}")


def _content(payload: bytes) -> RecordDict:
    """Returns the message content that carries the payload, as in fedtune's messages."""
    if len(payload) <= SHORT_BYTES:
        return RecordDict({"fedtune": ConfigRecord({"part-0": payload})})
    return RecordDict({"fedtune": ArrayRecord({"part-0": Array(np.frombuffer(payload, dtype=np.uint8))})})


def _payload(message: Message) -> bytes:
    part = next(iter(message.content["fedtune"].values()))
    if isinstance(part, Array):
        return part.numpy().tobytes()
    assert isinstance(part, bytes)
    return part
