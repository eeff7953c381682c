"""The history of each job of a server: its state, rounds, times, last score and reason, for people and programs.

The files of the queue and the run directories are the truth, so a restart of the server forgets nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.core.errors import InputError
from fedtune.core.job.job_file import recorded_job
from fedtune.core.round_records import ClientEvaluation, Evaluation
from fedtune.core.text import counted
from fedtune.server.costs.cost_ledger import CostLedger, costs_json
from fedtune.server.costs.cost_statement import rich_cost_table
from fedtune.server.live.job_queue import WAITING, Jobs, QueuedJob
from fedtune.server.run_directory import JOB, read_rounds
from fedtune.server.run_display import describe, format_bytes, format_seconds
from fedtune.strategies.evaluation_round import pooled

SHOWN_ROUNDS = 10

JobState = Literal["waiting", "running", "ending", "finished", "failed", "cancelled"]


@dataclass(frozen=True)
class JobRecord:
    """One job.

    Args:
        state: "running" while the server works on it, "ending" if it is cancelled and the server still closes its run.
        rounds_done: rounds that are on the disk.
        rounds: rounds of the job; None where its file cannot be read any more.
        submitted, began, ended: seconds since 1970; None where it has not happened, or is not known.
        train_loss: of the last round that has one.
        score: the last evaluation, by the server or else by the clients; None without one.
        reason: why it failed, or how far it was when it was cancelled.
        run: the run directory; it exists once the job has begun.
    """

    number: int
    name: str
    state: JobState
    priority: int
    rounds_done: int
    rounds: int | None
    submitted: float | None
    began: float | None
    ended: float | None
    train_loss: float | None
    score: Evaluation | None
    reason: str
    run: str

    def to_json(self) -> dict[str, Any]:
        """Returns the job's values for programs."""
        return asdict(self) | {"score": self.score.to_json() if self.score else None}

    @property
    def last_score(self) -> str:
        """Returns the last score in words; the training loss where nothing was evaluated yet."""
        if self.score:
            return describe(self.score)
        return f"training loss {self.train_loss:.3f}" if self.train_loss is not None else ""


def all_jobs(jobs: Jobs, current: str | None) -> list[JobRecord]:
    """Returns all jobs by number.

    Args:
        current: name of the job that the running server works on, if any.
    """
    return [_record(jobs, folder, entry, current) for folder, entry in jobs.all()]


def one_job(jobs: Jobs, name: str, current: str | None) -> JobRecord:
    """Returns one job.

    Raises:
        InputError: there is none of this name.
    """
    return _record(jobs, *jobs.find(name), current)


def costs_of(record: JobRecord) -> dict[str, Any] | None:
    """Returns the costs of a job's rounds so far, as a summary has them; None without any."""
    run = Path(record.run)
    rounds = _rounds(run)
    with suppress(InputError, msgspec.ValidationError):
        return costs_json(CostLedger.read(rounds), recorded_job(run / JOB).cost) if rounds else None
    return None


def how_far(jobs: Jobs, job: QueuedJob) -> str:
    """Says how far a job came that is cancelled now."""
    done = len(_rounds(jobs.run_path(job)))
    if not done:
        return "cancelled before its first round ended"
    return f"cancelled after {done} of {counted(_planned(job) or done, 'round')}"


def has_rounds(jobs: Jobs, job: QueuedJob) -> bool:
    """Returns whether a job has rounds whose result is kept."""
    return bool(_rounds(jobs.run_path(job)))


def last_score(rounds: Sequence[dict[str, Any]]) -> Evaluation | None:
    """Returns the last evaluation in the lines of rounds.jsonl: the server's, or else that of a round's clients."""
    for line in reversed(rounds):
        if line["eval"]:
            return Evaluation.from_json(line["eval"])
        parts = [
            ClientEvaluation(part["id"], Evaluation.from_json(part["eval"]))
            for part in line["client_evaluations"]
            if part["eval"]
        ]
        if parts:
            return pooled(parts)
    return None


def print_jobs(console: Console, records: Sequence[JobRecord]) -> None:
    """Prints a table of jobs for people."""
    if not records:
        console.print("no job yet; submit one with: fedtune server submit job.toml", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    ranked = any(record.priority for record in records)
    for column in (
        "no.",
        "job",
        "state",
        *(["priority"] if ranked else []),
        "rounds",
        "submitted",
        "took",
        "last score",
    ):
        right = column in ("no.", "priority", "rounds", "took")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "last score")
    for record in records:
        cells = (
            str(record.number),
            record.name,
            record.state,
            *([str(record.priority)] if ranked else []),
            f"{record.rounds_done}/{'?' if record.rounds is None else record.rounds}",
            _date(record.submitted, "%Y-%m-%d %H:%M"),
            _took(record, time.time()),
            record.last_score,
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for record in records:
        if record.state in ("failed", "cancelled", "ending"):
            console.print(f"{record.name}: {record.reason}", markup=False, soft_wrap=True)


def print_job(console: Console, record: JobRecord) -> None:
    """Prints one job for people: what is known of it, its last rounds, and what can be done next."""
    rounds = f"{record.rounds_done} of {'?' if record.rounds is None else record.rounds}"
    facts = {
        "job": f"{record.name}, number {record.number}, priority {record.priority}",
        "state": f"{record.state}: {record.reason}"
        if record.state in ("failed", "ending")
        else record.reason or record.state,
        "rounds": rounds,
        "submitted": _date(record.submitted),
        "began": _date(record.began),
        "ended": _date(record.ended),
        "last score": record.last_score,
        "run": record.run if record.began else "",
    }
    for label, text in facts.items():
        if text:
            console.print(f"{label:11}{text}", markup=False, soft_wrap=True)
    lines = read_rounds(Path(record.run))
    if left_out := max(0, len(lines) - SHOWN_ROUNDS):
        console.print(f"{counted(left_out, 'earlier round')} in {Path(record.run) / 'rounds.jsonl'}", soft_wrap=True)
    for line in lines[-SHOWN_ROUNDS:]:
        console.print(f"  {_round_text(line)}", markup=False, soft_wrap=True)
    if costs := costs_of(record):
        console.print(rich_cost_table(costs))
    console.print(f"next: {_next(record)}", markup=False, soft_wrap=True)


def _next(record: JobRecord) -> str:
    """Returns the commands that are of use now."""
    logs = f"fedtune server logs {record.name}"
    if record.state in ("waiting", "running"):
        return f"{logs} --follow, or fedtune server cancel {record.name}"
    if record.state == "ending":
        return f"{logs} --follow"
    if record.state == "failed" or not record.rounds_done:
        return f"{logs}; to submit it again, choose another --name and --set federation.run=N"
    return f"fedtune server fetch {record.name} --out DIR"


def _record(jobs: Jobs, folder: str, job: QueuedJob, current: str | None) -> JobRecord:
    run = jobs.run_path(job)
    rounds = _rounds(run)
    ended, reason, state = None, "", folder
    if folder != WAITING:
        outcome = job.outcome()
        ended, reason = outcome.ended, outcome.reason
    elif job.is_cancelled:
        state, reason = "ending", how_far(jobs, job)
    elif job.name == current:
        state = "running"
    losses = [line["train_loss"] for line in rounds if line["train_loss"] is not None]
    return JobRecord(
        job.number,
        job.name,
        state,  # type: ignore[arg-type]  # the queue's folders have the names of states
        job.priority,
        len(rounds),
        _planned(job),
        _written(job.path),
        _written(run / JOB),
        ended,
        losses[-1] if losses else None,
        last_score(rounds),
        reason,
        str(run),
    )


def _rounds(run: Path) -> list[dict[str, Any]]:
    try:
        return read_rounds(run)
    except InputError:  # damaged by hand; `fetch` and the report say so
        return []


def _planned(job: QueuedJob) -> int | None:
    with suppress(InputError):  # a file of an earlier release
        return job.load().federation.rounds
    return None


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _date(moment: float | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return "" if moment is None else time.strftime(form, time.localtime(moment))


def _took(record: JobRecord, now: float) -> str:
    """Returns the time since a job began, or from its beginning to its end."""
    if record.began is None or (record.ended is None and record.state != "running"):
        return ""
    return format_seconds((record.ended or now) - record.began)


def _round_text(line: dict[str, Any]) -> str:
    moved = format_bytes(line["bytes"]["up"] + line["bytes"]["down"])
    parts = [f"round {line['round']}: {format_seconds(line['seconds'])}"]
    parts.append(f"{len(line['survivors'])} of {counted(len(line['cohort']), 'client')}, {moved} moved")
    if line["train_loss"] is not None:
        parts.append(f"loss {line['train_loss']:.3f}")
    if line["aborted"]:
        parts.append(f"aborted: {line['aborted']}")
    if score := last_score([line]):
        parts.append(describe(score))
    return ", ".join(parts)
