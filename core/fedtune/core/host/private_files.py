"""Private files for keys and state: readable by their owner only, written atomically, never by two processes at once.

with ServiceLock(folder / "service.lock") as lock: ...     # raises InputError where another process holds it
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedtune.core.errors import InputError, RunError

MAX_FILE_BYTES = 16 << 20
UNFINISHED = "part-"
_POLL_SECONDS = 0.1


def private_folder(path: Path) -> Path:
    """Makes a folder that only its owner may enter, and restricts an existing one to its owner."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def check_private(path: Path) -> None:
    """Refuses a file or folder that users other than its owner may read or enter.

    Raises:
        InputError: it does not exist, or it is open to others; the message has the command that corrects this.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if mode & 0o077:
        narrow = "700" if path.is_dir() else "600"
        raise InputError(f"{path}: holds keys and must be its owner's only; run: chmod {narrow} {path}")


def write_private(path: Path, content: bytes | str) -> None:
    """Replaces a file's content atomically; only its owner can read the file."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{UNFINISHED}")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Removes temporary files that a crash of `write_private` left; only the process that writes `name` may call it."""
    for left in folder.glob(f".{name}.{UNFINISHED}*"):
        left.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Waits until a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, what: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """Returns a file's content.

    Raises:
        InputError: the file cannot be read, or is larger than the limit.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror}") from None
    if len(data) > limit:
        raise InputError(f"{path}: {what} has at most {limit} bytes")
    return data


def read_json(path: Path, what: str, limit: int = MAX_FILE_BYTES) -> Any:
    """Returns a JSON file's value.

    Raises:
        InputError: the file cannot be read, is too large, or is not JSON.
    """
    try:
        return json.loads(read_bounded(path, what, limit))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: cannot read {what}: it is not JSON") from None


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Waits for a lock file, so that processes that read and then replace a file do so one after the other."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class ServiceLock:
    """The lock of the one process that serves a folder; its file holds that process's id."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    def __enter__(self) -> Self:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self.holder()
            os.close(self._file)
            raise InputError(f"{self._path.parent}: process {holder or 'unknown'} serves it already") from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)

    def holder(self) -> int | None:
        """Returns the process that holds the lock now, or None."""
        try:
            file = os.open(self._path, os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            digits = os.pread(file, 20, 0).decode("ascii", "replace").strip()
            return int(digits) if digits.isdigit() else None
        finally:
            os.close(file)
        return None

    def stop_holder(self, seconds: float) -> int | None:
        """Asks the holding process to end, and waits until it has.

        Returns:
            The process that was stopped, or None where none held the lock.

        Raises:
            RunError: it did not end in time.
        """
        process = self.holder()
        if process is None:
            return None
        os.kill(process, signal.SIGTERM)
        end = time.monotonic() + seconds
        while self.holder() == process:
            if time.monotonic() > end:
                raise RunError(f"process {process} did not end within {seconds:.0f} s; end it with: kill -9 {process}")
            time.sleep(_POLL_SECONDS)
        return process
