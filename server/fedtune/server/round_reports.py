"""The report of a run while it goes on, written after a round, in a process of its own.

with RoundReports(directory.path) as reports:
    for record in rounds:
        reports.after_round()       # returns at once

Plots take more than a second of processor time, and tens of megabytes. So the process has the lowest priority, and a
report is begun three minutes after the last one at the earliest: they take less than a hundredth of the run's time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]

PAUSE_SECONDS = 180.0
_LOWEST_PRIORITY = 19


class RoundReports:
    """Writes report.html of a run again and again; leaving the block ends a report that is being written.

    Args:
        run: the run directory.
        command: the command that writes the report; None for `fedtune report`.
        now: seconds on a clock that only goes forward.
    """

    def __init__(
        self, run: Path, command: Sequence[str] | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._command = command or (sys.executable, "-m", "fedtune.server.cli", "report", str(run))
        self._now = now
        self._process: subprocess.Popen[bytes] | None = None
        self._began = now()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()  # so that it cannot replace the report that the run writes at its end
            self._process.wait()

    def after_round(self) -> None:
        """Begins the report of the rounds so far, unless one is being written or its time has not come."""
        writing = self._process is not None and self._process.poll() is None
        if writing or self._now() - self._began < PAUSE_SECONDS:
            return
        self._began = self._now()
        quiet = subprocess.DEVNULL  # the report at the end says why it cannot be written
        self._process = subprocess.Popen(self._command, stdin=quiet, stdout=quiet, stderr=quiet)
        with suppress(psutil.NoSuchProcess):  # it has ended already
            psutil.Process(self._process.pid).nice(_LOWEST_PRIORITY)
