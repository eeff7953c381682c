"""The trackers of a run, each in a process of its own that follows the run's files.

with RunTrackers(directory.path, job.tracking.to, display.note) as trackers:
    for record in rounds:
        trackers.after_round()      # passes on what the processes say; never waits

A tracker that raises, hangs or is killed takes nothing from the run but a few seconds at its end. A process, unlike a
thread, also survives the forks of a simulation, and can be ended while it hangs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]

from fedtune.core.job.settings import TrackerName
from fedtune.server.tracking.tracker_process import missing

END_SECONDS = 10.0  # for all trackers together, at the end of the run
_LOWER_PRIORITY = 5
_POLL_SECONDS = 0.05

Command = Callable[[Path, TrackerName], Sequence[str]]


def _command(run: Path, name: TrackerName) -> Sequence[str]:
    return (sys.executable, "-P", "-m", "fedtune.server.tracking.tracker_process", str(run), name)


class RunTrackers:
    """Runs the trackers' processes; leaving the block waits for them, for some seconds at most.

    Args:
        run: the run directory, which has its job file by now.
        names: the trackers, any of them.
        note: takes a sentence for people.
        command: the command of a tracker's process.
        limit: seconds for the end.
    """

    def __init__(
        self,
        run: Path,
        names: Sequence[TrackerName],
        note: Callable[[str], None],
        command: Command = _command,
        limit: float = END_SECONDS,
    ) -> None:
        self._run, self._note, self._limit = run, note, limit
        self._commands = {name: command(run, name) for name in dict.fromkeys(names)}
        self._processes: dict[TrackerName, _Process] = {}

    def __enter__(self) -> Self:
        for name, command in self._commands.items():
            try:
                self._processes[name] = _Process(command)
            except OSError as error:
                self._note(f"tracker {name} cannot begin, and the run goes on: {error.strerror}")
        return self

    def after_round(self) -> None:
        """Passes on what the processes have said since."""
        for name, process in list(self._processes.items()):
            for line in process.lines():
                self._note(line)
            if process.ended:
                self._left(name, f"its process ended with status {process.ended}, and the run goes on")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + self._limit
        try:
            for process in self._processes.values():
                process.tell_the_end()
            while time.monotonic() < deadline and any(process.runs for process in self._processes.values()):
                self.after_round()
                time.sleep(_POLL_SECONDS)
            self.after_round()
            for name, process in list(self._processes.items()):
                if process.runs:
                    self._left(name, f"it did not end within {self._limit:g} s")
        finally:
            for process in self._processes.values():
                process.kill()

    def _left(self, name: TrackerName, why: str) -> None:
        self._processes.pop(name).kill()
        self._note(f"tracker {name}: {why}; {missing(self._run)}")


class _Process:
    """One tracker's process, with what it says."""

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # so that Ctrl-C is the run's alone, and its own children end with it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout, self._rest = self._process.stdin, self._process.stdout, b""
        os.set_blocking(self._stdout.fileno(), False)
        with suppress(psutil.Error):  # it has ended already
            psutil.Process(self._process.pid).nice(_LOWER_PRIORITY)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def ended(self) -> int | None:
        """The exit status of a process that failed; None or 0 otherwise."""
        return self._process.poll()

    def lines(self) -> list[str]:
        """Returns the whole lines that it has said since the last call."""
        while piece := self._stdout.read(1 << 16):
            self._rest += piece
        *whole, self._rest = self._rest.split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]

    def tell_the_end(self) -> None:
        """Says that the run has ended; a byte, since a simulation's workers hold the other end of the pipe, too."""
        with suppress(OSError):  # it has ended already
            self._stdin.write(b"\n")
            self._stdin.close()

    def kill(self) -> None:
        """Ends the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._stdin, self._stdout):
            with suppress(OSError):
                end.close()
