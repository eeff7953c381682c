"""The clock of a service, and its pauses after failures; tests pass their own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """A source of time.

    Args:
        now: returns seconds since 1970.
        monotonic: returns seconds since some moment; it never goes back.
        sleep: waits for a number of seconds.
    """

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


SYSTEM_CLOCK = Clock()


class Backoff:
    """Pauses that double up to a limit, with jitter, so that the devices of a fleet do not all reconnect at once.

    Args:
        first, longest: seconds; a pause is between half of min(longest, first · 2^failures) and all of it.
        draw: returns values between 0 and 1, of which 1 gives the longest pause.
    """

    def __init__(self, first: float, longest: float, draw: Callable[[], float] = random.random) -> None:
        self._first, self._longest, self._draw = first, longest, draw
        self.failures = 0

    def next(self) -> float:
        """Counts one more failure; returns the pause after it, in seconds."""
        pause: float = min(self._longest, self._first * 2.0 ** min(self.failures, 16))
        self.failures += 1
        return pause * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        """Resets the pause after a success."""
        self.failures = 0
