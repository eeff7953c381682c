"""The profile of a simulation: where its time went, as a table and as a trace for a viewer.

    with profiling(display) as keep:
        ...                                 # spans are recorded from here on
        keep(directory.path)                # once the run has a directory, for the files
        ...

At the end of the block, also one that an error or Ctrl-C brings, the table is shown and is in profile.txt, and the
spans are in trace.json: Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import RunError
from fedtune.core.spans import ROUND, WORKER, Place, Recorder, Span, Sums, now, recording
from fedtune.core.text import counted
from fedtune.server.run_directory import PROFILE, TRACE
from fedtune.server.run_display import Display
from fedtune.server.run_files import storage, write_text

IDLE, OTHERWISE, REST = "idle", "otherwise", "rest of the rounds"
_SECOND = 1e9  # nanoseconds
_MICROSECOND = 1e3
_SERVER = "server"

Keep = Callable[[Path], None]
"""Says in which directory the files are to be written."""


@contextmanager
def profiling(display: Display) -> Iterator[Keep]:
    """Records the block's spans; then writes the files, if there is a directory for them, and shows the table."""
    kept: list[Path] = []
    recorder = Recorder()
    try:
        with recording(recorder):
            yield kept.append
    finally:
        for path in kept[-1:]:
            _show(Profile(recorder, now()), path, display)


def _show(profile: Profile, path: Path, display: Display) -> None:
    lines = list(profile.table())
    for line in ("", *lines):
        display.note(line)
    try:
        with storage(path):
            write_text(path / PROFILE, "\n".join(lines) + "\n")
            write_text(path / TRACE, profile.trace())
    except RunError as error:  # the run itself may be whole, or have ended by an error of its own
        display.note(f"the profile was not written: {error}")
    else:
        display.note(f"\nprofile  {path / PROFILE}\ntrace    {path / TRACE}")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        seconds: those of this work alone, without other rows' work within it.
        in_rounds: how many of these were within rounds.
        share: of the seconds of the server, or of all workers.
        calls: how often it was done; None in rows of what is left.
    """

    work: str
    seconds: float
    in_rounds: float
    share: float
    calls: int | None


class Profile:
    """The result of a recording.

    Args:
        ended: when the recording ended, on its clock.
    """

    def __init__(self, recorder: Recorder, ended: int) -> None:
        self._recorder = recorder
        self.seconds = (ended - recorder.began) / _SECOND
        self._lives = [each for each in recorder.spans if each.name == WORKER]
        rounds = recorder.sums(home=True).get(ROUND)
        self.rounds = rounds.calls if rounds else 0

    def server(self) -> list[Row]:
        """Returns the rows of the server, whose seconds add up to those of the recording."""
        rows = _rows(self._recorder.sums(home=True), self.seconds)
        left = self.seconds - sum(row.seconds for row in rows)
        return [*rows, Row(OTHERWISE, left, 0.0, _share(left, self.seconds), None)]

    def workers(self) -> list[Row]:
        """Returns the rows of the workers, whose seconds add up to those of all their lives; none without workers."""
        if not self._lives:
            return []
        lives = sum(each.end - each.start for each in self._lives) / _SECOND
        rows = _rows(self._recorder.sums(home=False), lives)
        idle = lives - sum(row.seconds for row in rows)
        in_rounds = len(self._lives) * self._round_seconds() - sum(row.in_rounds for row in rows)
        return [*rows, Row(IDLE, idle, in_rounds, _share(idle, lives), None)]

    def table(self) -> Iterator[str]:
        """Yields the lines of the table."""
        count = len(self._lives)
        yield f"where the time went: {self.seconds:.1f} s, {counted(self.rounds, 'round')}, {counted(count, 'worker')}"
        yield from self._part("the server", self.server())
        if count:
            yield from self._part("the worker" if count == 1 else f"the {count} workers together", self.workers())
        if dropped := self._recorder.dropped:
            yield f"{TRACE} has the first {len(self._recorder.spans):,} spans and not the other {dropped:,}"

    def trace(self) -> str:
        """Returns the trace: JSON with an event a line, times in microseconds from the begin of the recording."""
        kept = sorted(self._recorder.spans, key=lambda each: (each.place, each.start, -each.end))
        threads: dict[Place, int] = {}
        for each in kept:
            threads.setdefault(each.place, len(threads) + 1)
        events = [*self._names(threads), *(self._event(each, threads[each.place]) for each in kept)]
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        told = {"rounds": self.rounds, "dropped": self._recorder.dropped}
        return f'{{"displayTimeUnit":"ms","otherData":{json.dumps(told)},"traceEvents":[\n{lines}\n]}}\n'

    def _part(self, who: str, rows: Sequence[Row]) -> Iterator[str]:
        yield ""
        yield f"{who:32}{'seconds':>9}{'a round':>9}{'share':>7}{'calls':>9}"
        for row in rows:
            a_round = f"{row.in_rounds / self.rounds:.3f}" if self.rounds else ""
            calls = "" if row.calls is None else f"{row.calls:,}"
            yield f"  {row.work:30}{row.seconds:9.2f}{a_round:>9}{row.share:7.1%}{calls:>9}".rstrip()

    def _round_seconds(self) -> float:
        """Returns the seconds of all rounds, in which every worker could have worked."""
        return sum(sums.in_rounds for sums in self._recorder.sums(home=True).values()) / _SECOND

    def _names(self, threads: Mapping[Place, int]) -> Iterator[dict[str, Any]]:
        """Yields the events that name processes and threads."""
        home = self._recorder.home
        lives = {each.place: each.about for each in self._lives}
        named: dict[int, str] = {}
        for place, thread in threads.items():
            label = lives.get(place) or (_SERVER if place == home else place.thread)
            common = {"ph": "M", "ts": 0, "pid": place.process, "tid": thread}
            if place.process not in named:
                named[place.process] = "fedtune" if place.process == home.process else label
                yield {"name": "process_name", **common, "args": {"name": named[place.process]}}
            yield {"name": "thread_name", **common, "args": {"name": label}}

    def _event(self, span: Span, thread: int) -> dict[str, Any]:
        event: dict[str, Any] = {
            "name": span.name,
            "ph": "X",
            "ts": (span.start - self._recorder.began) / _MICROSECOND,
            "dur": (span.end - span.start) / _MICROSECOND,
            "pid": span.place.process,
            "tid": thread,
        }
        return {**event, "args": {"about": span.about}} if span.about else event


def _rows(sums: Mapping[str, Sums], whole: float) -> list[Row]:
    """Returns a row for each kind of work, that with the most seconds first."""
    rows = [
        Row(
            REST if name == ROUND else name,
            each.own / _SECOND,
            each.in_rounds / _SECOND,
            _share(each.own / _SECOND, whole),
            each.calls,
        )
        for name, each in sums.items()
        if each.own
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _share(seconds: float, whole: float) -> float:
    return seconds / whole if whole else 0.0
