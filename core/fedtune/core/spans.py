"""Spans of time: what the processes of a run do when, for the profile of a simulation.

    with span("training", client): ...                  # where nobody records, well under a microsecond
    with recording(Recorder()) as recorder: ...         # in the main process, which keeps all spans and their sums
    spans = drain()                                     # in a worker, to be sent along with its answer
    absorb(spans)                                       # in the main process

Workers send their spans with the answers that they send anyway, and write no files: so there is one place where spans
are bounded and summed, nothing to merge, and a run that ends early has its profile all the same. Times are those of
`time.monotonic_ns`, which is one clock for all processes of a machine, follows no change of the date, and is another
one on another machine.

A process has one recorder or none, which is the only state here. Spans of a thread nest. A span's own time is that in
which none of its thread was open within it, so own times add up.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Self

MOST_SPANS = 100_000  # that are kept, about 15 MB in a trace; the sums have all
ROUND = "round"  # the name of the span of a whole round, in the thread that records
WORKER = "worker"  # the name of the span of a worker's life, which its work is within


class Place(NamedTuple):
    """A thread of a process."""

    process: int
    thread: str


class Span(NamedTuple):
    """Something that a thread did for some time.

    Args:
        name: the kind of work, of which there are few.
        about: the client or the round that it was for.
        start, end: nanoseconds on the clock of `now`.
        own: nanoseconds outside the spans within it; 0 where the thread waits for another one that has spans.
    """

    name: str
    about: str
    place: Place
    start: int
    end: int
    own: int


@dataclass
class Sums:
    """The sums over all spans of a kind; times in nanoseconds of own time, of which `in_rounds` were within rounds."""

    calls: int = 0
    own: int = 0
    in_rounds: int = 0


now = time.monotonic_ns


class Recorder:
    """Keeps spans and their sums.

    Args:
        most: the most spans that are kept, besides those of rounds and workers; the sums have the others as well.

    Attributes:
        home: the thread that created it.
        began: when it was created.
        dropped: how many spans were not kept.
    """

    def __init__(self, most: int = MOST_SPANS) -> None:
        self.home = Place(os.getpid(), threading.current_thread().name)
        self.began = now()
        self.dropped = 0
        self._most = most
        self._home_thread = threading.get_ident()
        self._spans: list[Span] = []
        self._sums: dict[tuple[bool, str], Sums] = defaultdict(Sums)
        self._open: dict[int, list[_Open]] = {}  # of each thread, the outermost first
        self._lock = threading.Lock()

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans that are kept, in the order in which they ended."""
        with self._lock:
            return tuple(self._spans)

    def sums(self, home: bool) -> Mapping[str, Sums]:
        """Returns the sums by name, of the thread that created the recorder or of all others."""
        with self._lock:
            return {name: sums for (at_home, name), sums in self._sums.items() if at_home == home}

    def take(self, spans: Iterable[Span]) -> None:
        """Adds spans that have ended."""
        within = self._in_round()
        with self._lock:
            for each in spans:
                sums = self._sums[each.place == self.home, each.name]
                sums.calls += 1
                sums.own += each.own
                sums.in_rounds += each.own if within or each.name == ROUND else 0
                if len(self._spans) < self._most or each.name in (ROUND, WORKER):
                    self._spans.append(each)
                else:
                    self.dropped += 1

    def drain(self) -> tuple[Span, ...]:
        """Returns the spans that are kept, and forgets them."""
        with self._lock:
            spans, self._spans = tuple(self._spans), []
        return spans

    def end(self) -> None:
        """Ends the spans that are still open, as those of a run that was interrupted are."""
        for stack in tuple(self._open.values()):
            while stack:
                self.leave(stack[-1], stack)

    def enter(self, opened: _Open) -> None:
        """Notes that a span of this thread begins."""
        stack = self._open.setdefault(threading.get_ident(), [])
        stack.append(opened)

    def leave(self, opened: _Open, stack: list[_Open] | None = None) -> None:
        """Notes that a span ends, and with it those within it that were left open; ignores one that is not open.

        Args:
            stack: the open spans of its thread; by default this thread's.
        """
        end = now()
        stack = self._open.get(threading.get_ident(), []) if stack is None else stack
        while opened in stack:
            last = stack.pop()
            own = 0 if last.waits else end - last.start - last.within
            if stack:
                stack[-1].within += end - last.start
            self.take([Span(last.name, last.about, last.place, last.start, end, own)])

    def _in_round(self) -> bool:
        return any(each.name == ROUND for each in self._open.get(self._home_thread, ()))


class _Open:
    """A span that is open, as a context manager; it begins when it is entered."""

    __slots__ = ("_recorder", "about", "name", "place", "start", "waits", "within")

    def __init__(self, recorder: Recorder, name: str, about: str, waits: bool) -> None:
        self._recorder, self.name, self.about, self.waits = recorder, name, about, waits
        self.place = Place(os.getpid(), threading.current_thread().name)
        self.start = self.within = 0

    def __enter__(self) -> Self:
        self.start = now()
        self._recorder.enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._recorder.leave(self)


_recorder: Recorder | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def span(name: str, about: str = "", *, waits: bool = False) -> AbstractContextManager[object]:
    """Returns a context manager whose block is recorded as a span, if this process records.

    Args:
        about: the client or the round that the work is for.
        waits: whether the block only waits for spans of another thread, and so has no time of its own.
    """
    recorder = _recorder
    return _NOTHING if recorder is None else _Open(recorder, name, about, waits)


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Records the spans of this process during the block; those that are open at its end, end there."""
    global _recorder
    _recorder = recorder
    try:
        yield recorder
    finally:
        _recorder = None
        recorder.end()


def record_in_fork() -> None:
    """Begins to record again in a process that was forked, if its parent records; its spans are for `drain`."""
    global _recorder
    if _recorder is not None:
        _recorder = Recorder()


def drain() -> tuple[Span, ...]:
    """Returns the spans that ended since the last call, to be absorbed elsewhere; none where nobody records."""
    return () if _recorder is None else _recorder.drain()


def absorb(spans: Iterable[Span]) -> None:
    """Adds spans of another process, if this one records."""
    if _recorder is not None:
        _recorder.take(spans)


def add_span(name: str, about: str, place: Place, start: int, own: bool = True) -> None:
    """Adds a span of any thread that ends now, if this process records.

    Args:
        own: whether its time is its own.
    """
    end = now()
    absorb([Span(name, about, place, start, end, end - start if own else 0)])
