"""How a process that serves is told to end: SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """SIGTERM or Ctrl-C: raised wherever the main thread is, so that it ends at once."""


@contextmanager
def stopping() -> Iterator[None]:
    """Raises Stopped in the main thread on SIGTERM and SIGINT; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        raise Stopped

    before: dict[signal.Signals, Callable[..., object] | int | None] = {
        each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
