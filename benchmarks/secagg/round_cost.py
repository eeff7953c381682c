"""Common parts of this folder's benchmarks: a clock and the type of a result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType


class Clock:
    """A clock of this process's CPU seconds, over all threads, inside `with` blocks; other load changes them little."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Clock:
        self._start = time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.process_time() - self._start


@dataclass
class Cost:
    """The cost of one round.

    Attributes:
        clients: the number of clients, n.
        client: CPU seconds of one surviving client for all its messages.
        server: CPU seconds of the server, from the first key to the sum.
        up, down: payload bytes of one surviving client.
        error: ‖sum − true sum‖ / ‖true sum‖.
    """

    clients: int
    client: float = 0.0
    server: float = 0.0
    up: int = 0
    down: int = 0
    error: float = 0.0

    @property
    def total(self) -> float:
        return self.clients * self.client + self.server
