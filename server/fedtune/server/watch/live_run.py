"""The state of a run in progress, as its live page shows it; each page is told only what has changed since it last was.

    live = LiveRun(lambda: Shown("first", Path("runs/first")))
    run_rounds(..., display=Several(display, live), ...)
    seen = Seen(); message = live.changes(seen)       # a message for a page that was told `seen`; None without news

Clients choose their names and some of the reasons, so all text is made safe to show here, and the page shows it as
text.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedtune.core.errors import InputError
from fedtune.core.metrics import METRICS
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.server.report.reading import clean_line
from fedtune.server.run_directory import read_rounds

KEPT_NOTES = 20
NAME_LENGTH = 80
REASON_LENGTH = 200
ETA_ROUNDS = 5  # the last rounds whose mean says how long the others will take

Values = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """The run that is shown: its name, and its directory, which has the rounds of an earlier process."""

    name: str
    path: Path


@dataclass(frozen=True)
class ClientNow:
    """One client's part in the run: rounds, the seconds of its last answer, and why it dropped out, or ""."""

    rounds: int = 0
    seconds: float | None = None
    dropped: str = ""


@dataclass
class Seen:
    """The state that one page has been told."""

    run: int = -1
    rounds: int = 0
    job: Values = field(default_factory=dict)
    clients: dict[str, Values] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class LiveRun:
    """A display whose events become the state of a page.

    Args:
        shown: returns the run in progress; asked when its rounds begin.
        state: returns what is said of the job beside its rounds, for example "waiting for devices".
        devices: client -> values of it that are known without its rounds; a server has its devices here.
        problems: returns the last problems.
    """

    def __init__(
        self,
        shown: Callable[[], Shown],
        state: Callable[[], str] = lambda: "",
        devices: Callable[[], Mapping[str, Values]] = dict,
        problems: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._shown, self._state, self._devices, self._problems = shown, state, devices, problems
        self._lock = threading.Lock()
        self._run = 0
        self._job: dict[str, Any] = {}
        self._points: list[Values] = []
        self._clients: dict[str, ClientNow] = {}
        self._notes: deque[str] = deque(maxlen=KEPT_NOTES)
        self._progress = ""

    def changes(self, seen: Seen) -> dict[str, Any] | None:
        """Returns what a page does not know yet, and notes that it was told; None if there is nothing."""
        state, devices, problems, name = self._state(), self._devices(), self._problems(), self._shown().name
        message: dict[str, Any] = {}
        with self._lock:
            if seen.run != self._run:
                seen.run, seen.rounds, seen.job, seen.clients, seen.notes = self._run, 0, {}, {}, ()
                message["begin"] = True
            if points := self._points[seen.rounds :]:
                message["rounds"], seen.rounds = points, len(self._points)
            begun = self._job or {"name": clean_line(name, NAME_LENGTH)}  # a job that loads its model has no round yet
            job = begun | {"state": clean_line(self._progress or state, REASON_LENGTH)}
            clients = _joined(devices, self._clients)
            notes = (*self._notes, *(clean_line(text, REASON_LENGTH) for text in problems))
        if job != seen.job:
            message["job"] = seen.job = job
        if changed := {name: values for name, values in clients.items() if seen.clients.get(name) != values}:
            message["clients"] = changed
        if gone := [name for name in seen.clients if name not in clients]:
            message["gone"] = gone
        seen.clients = clients
        if notes != seen.notes:
            message["notes"] = seen.notes = notes
        return message or None

    # -- as a Display -------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Ignores the sentence; problems come by themselves."""

    def progress(self, task: str, done: int, count: int) -> None:
        """Shows work beside the rounds."""
        self._progress = f"{task}, {done / count:.0%}" if done < count else ""

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Begins with the rounds that an earlier process has done."""
        del moved
        shown = self._shown()
        try:
            lines = read_rounds(shown.path)[:done]
        except InputError:  # damaged by hand; the run itself says so
            lines = []
        with self._lock:
            self._run += 1
            self._points, self._clients, self._progress = [], {}, ""
            self._notes.clear()
            for line in lines:
                self._add(line)
            self._job = {
                "name": clean_line(shown.name, NAME_LENGTH),
                "round": min(done + 1, rounds),
                "rounds": rounds,
                "cohort": cohort,
                "answered": 0,
                "left": None,
            }

    def client(self, record: ClientRecord) -> None:
        """Takes a client that answered or dropped out."""
        with self._lock:
            self._job["answered"] = self._job.get("answered", 0) + 1
            self._take(record.id, record.answered, record.dropped, counts=False)

    def round(self, record: RoundRecord) -> None:
        """Takes a round that ended."""
        with self._lock:
            self._add(record.to_json())
            rounds = self._job.get("rounds", record.round)
            last = [point["seconds"] for point in self._points[-ETA_ROUNDS:]]
            left = sum(last) / len(last) * max(0, rounds - record.round)
            self._job |= {"round": min(record.round + 1, rounds), "answered": 0, "left": round(left)}

    def end(self, summary: dict[str, Any]) -> None:
        """Says how the run ended."""
        with self._lock:
            self._progress = clean_line(str(summary.get("status", "finished")), NAME_LENGTH)
            self._job |= {"left": 0}

    def _add(self, line: Values) -> None:
        score = Evaluation.from_json(line["eval"]) if line["eval"] else None
        metric = METRICS[score.metric] if score else None
        value = score.value(score.metric) if score else None
        self._points.append(
            {
                "round": line["round"],
                "seconds": line["seconds"],
                "loss": line["train_loss"],
                "eval": score.loss if score else None,
                "score": value if metric and metric.share else None,
                "metric": metric.title if metric else "",
                "asked": len(line["cohort"]),
                "answered": len(line["survivors"]),
                "up": line["bytes"]["up"],
                "down": line["bytes"]["down"],
                "aborted": clean_line(line["aborted"] or "", REASON_LENGTH),
            }
        )
        for client in line["clients"]:
            counts = not line["aborted"] and not client["dropped"]
            self._take(client["id"], client["answered"], client["dropped"], counts=counts)

    def _take(self, name: str, seconds: float | None, dropped: str | None, *, counts: bool) -> None:
        known = self._clients.get(name, ClientNow())
        why = clean_line(dropped or "", REASON_LENGTH)
        shown = known.seconds if seconds is None else round(seconds, 1)
        self._clients[name] = replace(known, rounds=known.rounds + counts, seconds=shown, dropped=why)
        if why and not counts:
            text = f"{clean_line(name, NAME_LENGTH)}: {why}"
            if text not in self._notes:
                self._notes.append(text)


_NEW = ClientNow()


def _joined(devices: Mapping[str, Values], clients: Mapping[str, ClientNow]) -> dict[str, Values]:
    """Returns the values of every client: what a server knows of its device, and its part in the run."""
    found: dict[str, Values] = {}
    for name in dict.fromkeys((*devices, *clients)):
        now = clients.get(name, _NEW)
        own = {"rounds": now.rounds, "seconds": now.seconds, "dropped": now.dropped}
        found[_safe_name(name)] = own | devices[name] if name in devices else own
    return found


@lru_cache(maxsize=10_000)
def _safe_name(name: str) -> str:
    return clean_line(name, NAME_LENGTH)
