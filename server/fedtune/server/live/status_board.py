"""The status of the running server, written to status.json every second for `fedtune server status`.

A server that starts again goes on from the last status: a device that trained before is not "never seen", and its
rounds count on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import read_json, write_private
from fedtune.core.round_records import ClientRecord, RoundRecord
from fedtune.core.text import counted
from fedtune.server.live.enrolled_devices import Devices, waiting
from fedtune.server.live.job_history import last_score
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.server_home import ServerHome
from fedtune.server.run_display import Display, describe, format_ago, format_seconds

STATUS = "status.json"
KEPT_PROBLEMS = 20
STALE_SECONDS = 15.0

DeviceState = Literal["never seen", "online", "offline", "refused", "sits out"]


@dataclass(frozen=True)
class PlanStatus:
    """A device's plan and its predicted costs, from its `RegistrationReply`."""

    rank: int
    weights: str
    sequence_length: int
    peak_mb: int
    seconds: float


@dataclass(frozen=True)
class DeviceStatus:
    """One enrolled device.

    Args:
        heard: when its last heartbeat came at the earliest, in seconds since 1970; None before the first.
        software: its fedtune version, once it has registered.
        hardware: cores, memory and accelerator, once it has registered.
        plan: its plan, once it has registered.
        rounds: the rounds to which it contributed, of all jobs.
        dropped: the reason why it last dropped out of a round, or "".
    """

    state: DeviceState = "never seen"
    heard: float | None = None
    software: str = ""
    hardware: str = ""
    plan: PlanStatus | None = None
    rounds: int = 0
    dropped: str = ""


@dataclass(frozen=True)
class JobStatus:
    """The job in progress.

    Args:
        evaluation: the last evaluation of the adapter, in words, or "".
        progress: the work beside the rounds that it is at, such as an evaluation, or "".
    """

    name: str
    state: str
    round: int = 0
    rounds: int = 0
    answered: int = 0
    cohort: int = 0
    train_loss: float | None = None
    evaluation: str = ""
    progress: str = ""


@dataclass(frozen=True)
class Problem:
    """A problem for the operator's attention."""

    time: str
    text: str


class _Left(msgspec.Struct):
    """The part of a status that the next process of the server goes on from."""

    devices: dict[str, DeviceStatus]
    problems: list[Problem]


@dataclass
class Board:
    """The current status, which several threads may change.

    Args:
        path: the path of status.json.
        display: a display that gets a run's events too.
    """

    path: Path
    address: str
    display: Display
    devices: dict[str, DeviceStatus] = field(default_factory=dict)
    job: JobStatus | None = None
    problems: deque[Problem] = field(default_factory=lambda: deque(maxlen=KEPT_PROBLEMS))
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _started: float = field(default_factory=time.time)

    def remember(self) -> None:
        """Takes devices and problems from the status that an earlier process has left."""
        if not self.path.exists():
            return
        with suppress(InputError, msgspec.ValidationError):  # cut off, or of an earlier release
            left = msgspec.convert(read_json(self.path, "the status"), _Left)
            self.devices = {
                name: replace(device, state="never seen" if device.heard is None else "offline")
                for name, device in left.devices.items()
            }
            self.problems.extend(left.problems)

    def problem(self, text: str) -> None:
        """Records a problem and shows it."""
        text = text[:1000]
        with self._lock:
            self.problems.append(Problem(_now(), text))
        self.display.note(text)

    def device(self, name: str, **changes: Any) -> None:
        """Gives a device's status for changes."""
        with self._lock:
            self.devices[name] = replace(self.devices.get(name, DeviceStatus()), **changes)

    def keep_devices(self, names: set[str]) -> None:
        """Removes devices that are no longer enrolled."""
        with self._lock:
            for name in set(self.devices) - names:
                del self.devices[name]

    def last_problems(self) -> list[Problem]:
        """Returns the last problems as they are now."""
        with self._lock:
            return list(self.problems)

    def snapshot(self) -> dict[str, DeviceStatus]:
        """Returns the devices as they are now."""
        with self._lock:
            return dict(self.devices)

    def working(self, **changes: Any) -> None:
        """Gives the current job's status for changes."""
        with self._lock:
            if self.job is not None:
                self.job = replace(self.job, **changes)

    def resumed(self, rounds: Sequence[dict[str, Any]]) -> None:
        """Takes the lines of rounds.jsonl that the job in progress has from before."""
        losses = [line["train_loss"] for line in rounds if line["train_loss"] is not None]
        score = last_score(rounds)
        self.working(train_loss=losses[-1] if losses else None, evaluation=describe(score) if score else "")

    # -- as a Display, for the run ------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Passes the sentence on."""
        self.display.note(text)

    def progress(self, task: str, done: int, count: int) -> None:
        """Takes the progress of work beside the rounds."""
        self.working(progress=f"{task}, {done / count:.0%}" if done < count else "")
        self.display.progress(task, done, count)

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Begins the job's first round in this process."""
        self.working(state="training", round=done + 1, rounds=rounds, cohort=cohort, answered=0)
        self.display.begin(done, rounds, cohort, moved)

    def client(self, record: ClientRecord) -> None:
        """Takes the record of a device that answered or dropped out."""
        with self._lock:
            if self.job is not None:
                self.working(answered=self.job.answered + 1)
            if record.id in self.devices:
                self.device(record.id, dropped=(record.dropped or "")[:300])
            if record.dropped:
                number = self.job.round if self.job else 0
                self.problems.append(Problem(_now(), f"round {number}: {record.id} dropped: {record.dropped[:300]}"))
        self.display.client(record)

    def round(self, record: RoundRecord) -> None:
        """Takes the record of a round that is on the disk."""
        with self._lock:
            rounds = self.job.rounds if self.job else record.round
            self.working(round=min(record.round + 1, rounds), answered=0, train_loss=record.train_loss)
            if record.eval is not None:
                self.working(evaluation=describe(record.eval))
            if record.aborted:
                self.problems.append(Problem(_now(), f"round {record.round} aborted: {record.aborted}"))
            for client in () if record.aborted else record.survivors:
                if known := self.devices.get(client.id):
                    self.device(client.id, rounds=known.rounds + 1)
        self.write()  # now, so that no crash forgets who contributed
        self.display.round(record)

    def end(self, summary: dict[str, Any]) -> None:
        """Takes the summary of the finished job."""
        self.display.end(summary)

    def write(self) -> None:
        """Replaces status.json."""
        with self._lock:
            content = {
                "pid": os.getpid(),
                "written": time.time(),
                "started": self._started,
                "address": self.address,
                "job": asdict(self.job) if self.job else None,
                "devices": {name: asdict(self.devices[name]) for name in sorted(self.devices)},
                "problems": [asdict(problem) for problem in self.problems],
            }
        write_private(self.path, json.dumps(content, indent=1) + "\n")


def read_status(home: ServerHome) -> dict[str, Any]:
    """Returns the status for programs: the server's last status, whether it runs, and the jobs that ended."""
    path, jobs = home.path / STATUS, Jobs(home)
    holder = home.lock.holder()
    status: dict[str, Any] = {"job": None, "devices": {}, "problems": [], "address": home.config.address}
    if path.exists():
        with suppress(InputError):  # an incomplete status is ignored; the lock says whether the server runs
            status |= read_json(path, "the status")
    fleet = Devices.load(home).fleet
    enrolled = sorted(fleet.devices)  # a stopped server's status lacks the newest devices
    status["devices"] = {name: asdict(DeviceStatus()) | status["devices"].get(name, {}) for name in enrolled}
    running = holder is not None and status.get("pid") == holder
    stale = time.time() - float(status.get("written", 0.0)) > STALE_SECONDS
    if not running:
        status["job"] = None
        for device in status["devices"].values():
            device["state"] = "offline" if device["state"] == "online" else device["state"]
    return status | {
        "state": ("not answering" if stale else "running") if running else "starting" if holder else "stopped",
        "waiting": [job.name for job in jobs.waiting() if status["job"] is None or job.name != status["job"]["name"]],
        "finished": jobs.finished(),
        "failed": jobs.failed(),
        "cancelled": jobs.cancelled(),
        "certificate_days_left": round(home.certificate_days_left(), 1),
        "fleet": {
            "entry": fleet.number,
            "days_left": round((fleet.expires - time.time()) / 86_400, 1),
            "wait_for_approval": {request.code: request.name for request in waiting(home)},
        },
    }


def print_status(console: Console, status: dict[str, Any]) -> None:
    """Prints the status for people."""
    since = ""
    if status["state"] == "running":
        since = f" for {format_seconds(time.time() - status['started'])}, process {status['pid']}"
    console.print(f"server {status['address']}: {status['state']}{since}", markup=False)
    console.print(f"certificate: {counted(round(status['certificate_days_left']), 'day')} left", markup=False)
    fleet = status["fleet"]
    held = f"entry {fleet['entry']} of its log, valid for {counted(round(fleet['days_left']), 'more day')}"
    if not fleet["entry"]:
        held = "no log yet; take the owner's: fedtune server publish fleet.jsonl"
    console.print(f"fleet: {held}", markup=False)
    for code, name in fleet["wait_for_approval"].items():
        console.print(f"waits for the owner's approval: {name}, code {code}", markup=False)
    if job := status["job"]:
        loss = f", loss {job['train_loss']:.3f}" if job["train_loss"] is not None else ""
        more = "".join(f"; {job[key]}" for key in ("evaluation", "progress") if job[key])
        console.print(
            f"job {job['name']}: {job['state']}, round {job['round']}/{job['rounds']}, "
            f"{job['answered']} of {job['cohort']} answered{loss}{more}",
            markup=False,
        )
    for label in ("waiting", "finished", "cancelled"):
        if status[label]:
            console.print(f"{label}: {', '.join(status[label])}", markup=False)
    for name, reason in status["failed"].items():
        console.print(f"failed: {name}: {reason}", markup=False)
    if status["devices"]:
        table = Table(box=None, pad_edge=False)
        for column in ("device", "state", "heard", "rounds", "software", "hardware", "last drop"):
            table.add_column(column)
        for name, device in status["devices"].items():
            heard = "" if device["heard"] is None else f"{format_ago(time.time() - device['heard'])} ago"
            cells = (
                name,
                device["state"],
                heard,
                str(device["rounds"]),
                device["software"],
                device["hardware"],
                device["dropped"],
            )
            table.add_row(*map(Text, cells))  # as plain text and not markup, since devices chose some of the words
        console.print(table)
        if plans := {name: device["plan"] for name, device in status["devices"].items() if device.get("plan")}:
            _print_plans(console, plans)
    else:
        remedy = "on a device: fedtune client join; on the owner's machine: fedtune fleet approve CODE"
        console.print(f"no device is in the fleet; {remedy}", markup=False, soft_wrap=True)
    for problem in status["problems"][-5:]:
        console.print(f"{problem['time']}  {problem['text']}", markup=False, soft_wrap=True)


def _print_plans(console: Console, plans: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("plan of", "rank", "weights", "tokens", "memory", "a round"):
        table.add_column(column)
    for name, plan in plans.items():
        table.add_row(
            name,
            str(plan["rank"]),
            plan["weights"],
            str(plan["sequence_length"]),
            f"{plan['peak_mb']} MB",
            f"{plan['seconds']:g} s",
        )
    console.print(table)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
