"""The hidden folder in which an export builds everything, inside the folder that it publishes to.

One export at a time works in a folder: its log there is locked, and a lock ends with its process. So whatever hidden
folders the holder of the lock finds were left by exports that were killed, each with a whole model in it.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.core.errors import ExportError, RunError
from fedtune.server.run_files import plain_errors

LOG = "export.log"
PREFIX = ".export-"


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """Gives a hidden folder inside `out`, and removes it in any case; the log stays in `out`, unless it is empty.

    Raises:
        ExportError: another export works in `out`.
        RunError: the disk is full or fails.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with plain_errors(), _locked(out), tempfile.TemporaryDirectory(prefix=PREFIX, dir=out) as name:
            yield Path(name)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise RunError(f"{out}: {reason}; nothing was exported") from error
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the log's lock, with an empty log and without folders of dead exports."""
    log = out / LOG
    with log.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"{out}: another export works here; wait for its end, or choose another --out") from error
        try:
            file.truncate(0)
            for left in out.glob(f"{PREFIX}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            if not log.stat().st_size:
                log.unlink()
