"""Atomic writing of files: a crash at any instant leaves either the old content or the new."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedtune.core.errors import RunError
from fedtune.core.host.private_files import sync_directory

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises the OSError behind safetensors' text about a failing disk."""
    try:
        yield
    except SafetensorError as error:
        if not (number := _OS_ERROR.search(str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def storage(directory: Path) -> Iterator[None]:
    """Raises a RunError with advice for a full or failing disk."""
    try:
        with plain_errors():
            yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise RunError(
            f"{directory}: {reason}; what was acknowledged is safe. Then go on with: fedtune resume {directory}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file's content atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Appends one line and waits until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory, which replaces the one of that name only after the block has filled it."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    sync_tree(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_tree(directory: Path) -> None:
    """Waits until all files of a directory are on the disk."""
    for part in directory.rglob("*"):
        if part.is_file():
            with part.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
