"""The logs of a server and of each job: text files that begin again when they are full, and how they are followed.

    logs/server.log             all jobs, and everything else that the server says
    logs/NNNNNN-NAME.log        one job; NAME.log.1 is what came before, up to NAME.log.3

They have the lines of the server's standard output, each with its time.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from rich.console import Console

from fedtune.core.host.private_files import private_folder
from fedtune.server.live.job_queue import QueuedJob
from fedtune.server.live.server_home import ServerHome
from fedtune.server.run_display import Display, Terminal

FILE_BYTES = 1 << 20
KEPT_FILES = 3  # beside the one that is written
_WIDTH = 120
_READ_BYTES = 1 << 16


def server_log(home: ServerHome) -> Path:
    """Returns the path of the server's own log."""
    return home.path / "logs" / "server.log"


def job_log(home: ServerHome, job: QueuedJob) -> Path:
    """Returns the path of a job's log."""
    return home.path / "logs" / f"{job.path.stem}.log"


@contextmanager
def logged(path: Path, size: int = FILE_BYTES) -> Iterator[Display]:
    """Gives a display that writes to a log."""
    private_folder(path.parent)
    handler = _LogFile(path, maxBytes=size, backupCount=KEPT_FILES, encoding="utf-8", errors="replace")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    try:
        yield Terminal(Console(file=_Lines(handler), highlight=False, force_terminal=False, width=_WIDTH))
    finally:
        handler.close()


class _LogFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the library's name
        """Leaves out a line that the disk does not take: standard output has it, and the work goes on."""


class _Lines(io.StringIO):
    """A text stream whose lines go to a log, with their times."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler, self._rest = handler, ""

    def write(self, text: str, /) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._handler.emit(logging.LogRecord("fedtune", logging.INFO, "", 0, line.rstrip(), None, None))
        return len(text)


def read_log(path: Path, ended: Callable[[], bool], pause: Callable[[], None]) -> Iterator[str]:
    """Yields the lines of a log, oldest first, and then new ones as they come, also where it begins again meanwhile.

    Args:
        ended: returns whether nothing will be added any more; then the lines end.
        pause: waits between two looks.
    """
    rest = b""
    file = _oldest(path)
    while True:
        over = ended()  # before the read, which then finds all there is
        while file is None and not over:
            pause()
            over, file = ended(), _oldest(path)
        if file is None:
            return
        newer = _newer(path, file)  # before the read: a file that has a successor is complete
        while data := file.read(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in lines)
        if newer:
            file.close()
            file = newer
        elif over:
            file.close()
            return
        else:
            pause()


def _names(path: Path) -> list[Path]:
    """Returns the names of a log's files, newest first."""
    return [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT_FILES + 1))]


def _oldest(path: Path) -> io.BufferedReader | None:
    for name in reversed(_names(path)):
        try:
            return name.open("rb")
        except FileNotFoundError:
            continue
    return None


def _newer(path: Path, file: io.BufferedReader) -> io.BufferedReader | None:
    """Returns the file that follows an open one; None if that is the newest, or renaming is under way."""
    ours = os.fstat(file.fileno()).st_ino
    for newer, name in zip([None, *_names(path)], _names(path), strict=False):
        try:
            if name.stat().st_ino == ours:
                return newer.open("rb") if newer else None
        except FileNotFoundError:
            continue
    try:
        return path.open("rb") if path.stat().st_ino != ours else None  # so much was written that ours is gone
    except FileNotFoundError:
        return None
