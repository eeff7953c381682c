"""The display of a run: a progress bar on a terminal, plain lines when the output is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedtune.core.ledger import PURPOSES
from fedtune.core.metrics import EXACT
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.core.text import counted
from fedtune.server.costs.cost_statement import cost_sentences, rich_cost_table
from fedtune.server.privacy_statement import guarantee

INTERRUPTED = 130  # the exit status that a shell reports for a command that Ctrl-C ended
LINE_SECONDS = 10.0  # time between two lines about work that takes long, where the output is piped


class Display(Protocol):
    """The interface of displays, which are told of a run's events as they happen."""

    def note(self, text: str) -> None:
        """Takes a sentence about the run."""

    def progress(self, task: str, done: int, count: int) -> None:
        """Takes the progress of work beside the rounds: first 0 of its pieces, at last all of them."""

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Begins after `done` of `rounds` rounds with about `cohort` clients each, which moved `moved` bytes so far."""

    def client(self, record: ClientRecord) -> None:
        """Takes the record of a client that answered or dropped out."""

    def round(self, record: RoundRecord) -> None:
        """Takes the record of a round that ended and is on the disk."""

    def end(self, summary: dict[str, Any]) -> None:
        """Takes the summary of the finished run."""


class Silent:
    """A display that shows nothing, for `--quiet` and tests."""

    def note(self, text: str) -> None: ...
    def progress(self, task: str, done: int, count: int) -> None: ...
    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None: ...
    def client(self, record: ClientRecord) -> None: ...
    def round(self, record: RoundRecord) -> None: ...
    def end(self, summary: dict[str, Any]) -> None: ...


class Several:
    """Passes every event on to several displays."""

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    @contextmanager
    def also(self, display: Display) -> Iterator[None]:
        """Tells one more display, during the block."""
        before = self._displays
        self._displays = (*before, display)
        try:
            yield
        finally:
            self._displays = before

    def note(self, text: str) -> None:
        """Passes a sentence on."""
        for display in self._displays:
            display.note(text)

    def progress(self, task: str, done: int, count: int) -> None:
        """Passes the progress of work beside the rounds on."""
        for display in self._displays:
            display.progress(task, done, count)

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Passes the begin of the rounds on."""
        for display in self._displays:
            display.begin(done, rounds, cohort, moved)

    def client(self, record: ClientRecord) -> None:
        """Passes a client's record on."""
        for display in self._displays:
            display.client(record)

    def round(self, record: RoundRecord) -> None:
        """Passes a round's record on."""
        for display in self._displays:
            display.round(record)

    def end(self, summary: dict[str, Any]) -> None:
        """Passes the summary on."""
        for display in self._displays:
            display.end(summary)


class Terminal:
    """A live bar on a terminal; one line a round when the output is piped. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("rounds", total=None, status="", start=False, visible=False)
        self._work = WorkProgress(self._progress if self._live else None, self.note, time.monotonic)
        self._rounds = 0
        self._round = 0
        self._bytes = 0
        self._status = ""
        self._began = time.monotonic()
        self._done_at_begin = 0
        self._cohort = 1
        self._answered = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:  # otherwise it would only print an empty line
            self._progress.stop()

    def note(self, text: str) -> None:
        """Prints the sentence."""
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, task: str, done: int, count: int) -> None:
        """Shows a bar of its own until the work is done."""
        self._work.show(task, done, count)

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Shows the bar of the rounds."""
        self._rounds, self._round, self._done_at_begin, self._cohort = rounds, done, done, max(cohort, 1)
        self._bytes = moved
        self._began = time.monotonic()
        if self._live:
            self._progress.start_task(self._task)
            self._progress.update(self._task, total=rounds * self._cohort, completed=done * self._cohort, visible=True)
            self._refresh()
            self._progress.start()

    def client(self, record: ClientRecord) -> None:
        """Advances the bar."""
        self._answered += 1
        if self._live:
            self._refresh()
        if record.dropped and self._live:
            self._progress.console.print(
                f"round {self._round + 1}: client {record.id} dropped: {record.dropped}", markup=False, style="yellow"
            )

    def round(self, record: RoundRecord) -> None:
        """Prints the round's numbers."""
        self._round, self._answered = record.round, 0
        self._bytes += record.traffic.bytes_up + record.traffic.bytes_down
        parts = []
        if record.train_loss is not None:
            parts.append(f"loss {record.train_loss:.3f}")
        elif not record.survivors:
            parts.append("no survivor")
        if record.eval is not None:
            parts.append(" ".join(record.eval.figures()[0]))
        if lost := len(record.clients) - len(record.survivors):
            parts.append(f"{lost} of {counted(len(record.clients), 'client')} dropped")
        if record.aborted:
            parts.append(f"aborted: {record.aborted}")
        parts.append(f"{format_bytes(self._bytes)} moved")
        self._status = "  ".join(parts)
        if self._live:
            self._refresh()
        else:
            self.note(f"round {record.round}/{self._rounds}  {self._status}  {self._left()}")
            for client in record.clients:
                if client.dropped:
                    self.note(f"  client {client.id} dropped: {client.dropped}")
            for text in record.notes:
                self.note(f"  {text}")

    def end(self, summary: dict[str, Any]) -> None:
        """Prints the final table, prompts and paths."""
        self._progress.stop()
        print_summary(self.console, summary)

    def _refresh(self) -> None:
        self._progress.update(
            self._task,
            completed=self._round * self._cohort + self._answered,
            description=f"round {min(self._round + 1, self._rounds)}/{self._rounds}",
            status=self._status,
        )

    def _left(self) -> str:
        done = self._round - self._done_at_begin
        seconds = (time.monotonic() - self._began) / done * (self._rounds - self._round) if done else 0.0
        return f"{format_seconds(seconds)} left"


class WorkProgress:
    """The progress of work beside the rounds, such as an evaluation: a bar, or a line now and then.

    Args:
        bars: the bars of a terminal; None where the output is piped.
        note: prints a line.
        now: a clock, in seconds.
    """

    def __init__(self, bars: Progress | None, note: Callable[[str], None], now: Callable[[], float]) -> None:
        self._bars, self._note, self._now = bars, note, now
        self._bar: TaskID | None = None
        self._began = self._noted = 0.0

    def show(self, task: str, done: int, count: int) -> None:
        """Shows that `done` of `count` pieces are done; the bar goes with the last one.

        A piped output gets a line where work is expected to take longer than LINE_SECONDS, and then one as often.
        """
        if done == 0:
            self._began = self._noted = self._now()
        if self._bars is not None:
            self._update(self._bars, task, done, count)
        elif 0 < done < count:
            now = self._now()
            left = (now - self._began) / done * (count - done)
            if (self._noted == self._began and left > LINE_SECONDS) or now - self._noted > LINE_SECONDS:
                self._noted = now
                self._note(f"{task}: {done / count:.0%}, {format_seconds(left)} left")

    def _update(self, bars: Progress, task: str, done: int, count: int) -> None:
        if self._bar is None:
            self._bar = bars.add_task(task, total=count, status="")
            bars.start()
        bars.update(self._bar, completed=done, total=count, refresh=True)
        if done >= count:
            bars.remove_task(self._bar)
            bars.refresh()
            self._bar = None


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Prints the final table (quality before and after, bytes against fp32 FedAvg, time, memory), answers and paths."""
    table = Table(title=_size(summary), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = summary["eval_before"], summary["eval_after"]
    if before and after:
        figures = (Evaluation.from_json(score).figures() for score in (before, after))
        for (label, first), (_, last) in zip(*figures, strict=True):
            table.add_row(label, first, last)
    clients = summary["client_evaluation"]
    if clients:
        own = "on the clients' own held-out data"
        table.add_row(f"exact match {own}", "", f"{clients['exact_match']:.1%}")
        if not after:
            table.add_row(f"loss {own}", "", f"{clients['loss']:.3f}")
    moved, baseline = summary["bytes"]["total"], summary["fp32_fedavg_bytes"]
    plain = f"fp32 FedAvg of rank {summary['fp32_fedavg_rank']}"
    table.add_row(f"bytes moved ({plain} | this run)", format_bytes(baseline), format_bytes(moved))
    table.add_row(f"{plain} / this run", "", f"{summary['traffic_ratio']:.1f}x")
    table.add_row("time", "", format_seconds(summary["seconds"]))
    table.add_row("peak memory", "", f"{summary['peak_rss_mb']:.0f} MB")
    records = summary["records"]
    if lost := {name: count for name, count in records.items() if count and name not in ("read", "kept")}:
        losses = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in lost.items())
        table.add_row("records kept", f"{records['read']:,} read", f"{records['kept']:,}")
        table.caption = losses
    console.print(table)
    console.print(f"scores from: {summary['scores_from']}", markup=False)
    console.print(_traffic_table(summary["traffic"]))
    if costs := summary.get("costs"):
        console.print(rich_cost_table(costs))
        for sentence in cost_sentences(costs, after["metric"] if after else EXACT):
            console.print(sentence, markup=False)
    if len(summary["tiers"]) > 1:
        console.print(_tier_table(summary["tiers"]))
    console.print(what_the_server_saw(summary["secure_aggregation"]), markup=False)
    if summary["privacy"]:
        console.print(guarantee(summary["privacy"]), markup=False)
    for example in summary["answers"]:
        console.print()
        for label in ("prompt", "before", "after", "expected"):
            line = " ".join(example[label].split())
            console.print(f"  {label:8}  {line}", markup=False, no_wrap=True, overflow="ellipsis")
    console.print()
    for label, path in summary["paths"].items():
        console.print(f"{label:8} {path}", markup=False, soft_wrap=True)


def _size(summary: dict[str, Any]) -> str:
    return f"{counted(summary['rounds'], 'round')}, {counted(summary['clients'], 'client')}"


def _traffic_table(traffic: dict[str, Any]) -> Table:
    table = Table(title="what travelled", title_justify="left")
    table.add_column("for")
    table.add_column("down", justify="right")
    table.add_column("up", justify="right")
    for purpose in PURPOSES:
        entries = [traffic[way].get(purpose) for way in ("down", "up")]
        if any(entries):
            table.add_row(purpose, *(format_bytes(entry["bytes"]) if entry else "" for entry in entries))
    return table


def _tier_table(tiers: list[dict[str, Any]]) -> Table:
    table = Table(title="rank indices trained", title_justify="left")
    for column in ("tier", "asked", "trained less", "sat out", "updates", "share"):
        table.add_column(column, justify="right")
    for line in tiers:
        counts = (f"{line[key]:,}" for key in ("asked", "merged", "sat_out", "updates"))
        table.add_row(str(line["tier"]) if line["tier"] else "none", *counts, f"{line['share']:.0%}")
    return table


def what_the_server_saw(secure: dict[str, Any]) -> str:
    """Returns plain sentences about the data that the server could see."""
    if not secure["enabled"]:
        return "The server saw every client's update, training loss and example count: secure aggregation was off."
    if not secure["sums"]:
        return "The server saw no update and no sum: no round of secure aggregation was completed."
    scores = ", and each client's score on its own held-out data" if secure["evaluations_shown"] else ""
    groups = f", up to {secure['groups']} a round" if secure["groups"] > 1 else ""
    return (
        f"The server saw {counted(secure['sums'], 'sum')}{groups}, each over {secure['summed_least']} clients or more "
        f"(under {secure['minimum']} there would have been none; {secure['threshold']} had to agree to open one), who "
        f"took part, and sizes{scores}. It saw no single client's update, training loss or example count."
    )


def format_bytes(count: float) -> str:
    """Formats a number of bytes: 1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Formats a duration: 3725 -> "1:02:05"; 65 -> "1:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_ago(seconds: float) -> str:
    """Formats a time that has passed, as people say it: "40 s", "12 min", "5 h", "3 days"."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < limit:
            return f"{max(seconds, 0.0) / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def error_console() -> Console:
    """Returns the console on stderr, for error messages."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


@contextmanager
def shown(silent: bool, advice: Callable[[], str]) -> Iterator[Display]:
    """Shows a command's work; Ctrl-C ends the process with status 130 after one line.

    Args:
        advice: says what an interruption leaves, and how to go on.
    """
    with nullcontext(Silent()) if silent else Terminal() as display:
        try:
            yield display
        except KeyboardInterrupt:
            error_console().print(f"interrupted; {advice()}", markup=False)
            raise SystemExit(INTERRUPTED) from None


def describe(evaluation: Evaluation | None) -> str:
    """Describes an evaluation in one clause."""
    if evaluation is None:
        return "no evaluation data"
    return ", ".join(f"{label} {figure}" for label, figure in evaluation.figures())
