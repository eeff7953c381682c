"""One tracker's process: it follows the files of a run, and sends what the tracker lacks.

    python -m fedtune.server.tracking.tracker_process runs/first mlflow

How far it came is in the run directory's tracking/NAME.json, so that a run that is resumed goes on in the same run of
the tracker, and a tracker that was down gets its rounds later. The process ends some time after its standard input has
said so or was closed. It prints sentences for people; what the libraries print goes nowhere.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from fedtune.core.job.job_file import recorded_job
from fedtune.core.job.settings import TrackerName
from fedtune.server.report.reading import clean_line
from fedtune.server.run_directory import JOB, ROUNDS, SUMMARY, read_eval_before, read_summary
from fedtune.server.run_files import write_json
from fedtune.server.tracking.tracked_figures import (
    evaluation_figures,
    round_figures,
    summary_figures,
    tracked_settings,
)
from fedtune.server.tracking.tracker_libraries import ExperimentTracker, Target, open_tracker

FOLDER = "tracking"
LOOK_SECONDS = 1.0
RETRY_SECONDS = 30.0
LAST_SECONDS = 60.0  # after which a process ends that hangs and whose parent is gone
REASON_LENGTH = 300

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_SHORTEST_SECRET = 6
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")

Open = Callable[[TrackerName, Target], ExperimentTracker]


class Follower:
    """Sends a run's records to one tracker; what it has sent is not sent again.

    Args:
        run: the run directory.
        say: takes a sentence for people.
        open_tracker: opens the tracker.
    """

    def __init__(
        self, run: Path, name: TrackerName, say: Callable[[str], None], open_tracker: Open = open_tracker
    ) -> None:
        self._run, self._name, self._say, self._open = run, name, say, open_tracker
        self._state = run / FOLDER / f"{name}.json"
        self._target, self._ended = _read_state(self._state, run)
        self._tracker: ExperimentTracker | None = None
        self._read = 0  # bytes of rounds.jsonl
        self._failing = self._shown = False

    def follow(self, ending: threading.Event, look: float = LOOK_SECONDS, retry: float = RETRY_SECONDS) -> None:
        """Sends records as they come, until the run ends.

        Args:
            look: seconds between two looks for records.
            retry: seconds until a tracker that fails is tried again.
        """
        pause = look
        while not ending.wait(pause):
            pause = look if self._tried(self._send) else retry
        self.finish()

    def finish(self) -> bool:
        """Sends what the tracker lacks, and the summary if there is one; returns whether the tracker took it."""
        sent = self._tried(self._send_all)
        if not sent:
            self._say(f"tracker {self._name}: {missing(self._run)}")
        return sent

    def _send(self) -> None:
        """Sends the settings and rounds that the tracker lacks, which is opened only then; raises what it raises."""
        if self._tracker is None:
            self._read = 0
        lines = self._new_lines()
        if 0 <= self._target.done >= max((line["round"] for line in lines), default=0):
            return
        tracker = self._opened()
        for line in lines:
            if line["round"] > self._target.done:
                tracker.log(line["round"], round_figures(line))
                self._keep(line["round"])

    def _send_all(self) -> None:
        self._send()
        if self._ended:
            return
        summary = read_summary(self._run) if (self._run / SUMMARY).is_file() else None
        self._opened().end(summary["status"] if summary else None, summary_figures(summary) if summary else {})
        self._keep(self._target.done, ended=summary is not None)

    def _tried(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, the run goes on
            self._tracker = None
            if not self._failing:
                reason = without_secrets(f"{type(error).__name__}: {error}", os.environ)
                self._say(f"tracker {self._name} fails, the run itself does not: {clean_line(reason, REASON_LENGTH)}")
            self._failing = True
            return False
        self._failing = False
        return True

    def _opened(self) -> ExperimentTracker:
        """Returns the tracker; one that does not know the run yet gets the settings first."""
        if self._tracker is not None:
            return self._tracker
        tracker = self._open(self._name, self._target)
        if tracker.run != self._target.known:
            self._target = Target(self._run, tracker.run)
            self._keep(self._target.done)
        if self._target.done < 0:
            tracker.settings(tracked_settings(recorded_job(self._run / JOB)))
            if before := evaluation_figures(read_eval_before(self._run)):
                tracker.log(0, before)
            self._keep(0)
        self._tracker = tracker
        if not self._shown:
            self._say(f"tracker {self._name}: {without_secrets(tracker.shown, os.environ)}")
        self._shown = True
        return tracker

    def _keep(self, done: int, ended: bool = False) -> None:
        self._target, self._ended = replace(self._target, done=done), ended
        self._state.parent.mkdir(exist_ok=True)
        write_json(self._state, {"run": self._target.known, "done": done, "ended": ended})

    def _new_lines(self) -> list[dict[str, Any]]:
        """Returns the whole lines of rounds.jsonl that were not read before."""
        path = self._run / ROUNDS
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._read)
            whole = [line for line in file if line.endswith(b"\n")]
        self._read += sum(map(len, whole))
        return [json.loads(line) for line in whole]


def missing(run: Path) -> str:
    """Returns the sentence that says how a tracker gets what it lacks."""
    return f"it may lack the last rounds and the summary. To send them: fedtune track {run}"


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Returns the text without users in URLs, and without the values of variables whose names are those of secrets."""
    for name, value in environment.items():
        if _SECRET.search(name.upper()) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "…")
    return _USER_IN_URL.sub("", text)


def _read_state(path: Path, run: Path) -> tuple[Target, bool]:
    """Returns how far the tracker is, and whether it has the summary."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return Target(run, str(state["run"]), int(state["done"])), bool(state["ended"])
    except (OSError, ValueError, KeyError, TypeError):  # there is none yet, or it was damaged by hand
        return Target(run), False


def main() -> None:
    """Follows the run that the command line names, for the tracker that it names."""
    path, name = sys.argv[1:]
    assert name in get_args(TrackerName)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w", encoding="utf-8") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    ending = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read(1)
        ending.set()
        threading.Event().wait(LAST_SECONDS)
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True, name="end of the run").start()
    Follower(Path(path), cast(TrackerName, name), lambda text: print(text, file=out, flush=True)).follow(ending)


if __name__ == "__main__":
    main()
