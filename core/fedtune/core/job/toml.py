"""TOML files of users: read whole, bounded in size and depth, and refused with a reason."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedtune.core.errors import JobError

_DEEPEST = 8  # tables and arrays in each other; a job has three


def read_table(path: Path, what: str, limit: int) -> dict[str, Any]:
    """The file's content.

    Args:
        what: "a job file", for people.
        limit: most bytes.

    Raises:
        JobError: it cannot be read, is larger or nested deeper than it may be, or is not TOML.
    """
    try:
        if path.stat().st_size > limit:
            raise JobError([f"larger than {limit} bytes; expected {what}"], path)
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError([f"cannot be read: {error.strerror}"], path) from error
    except ValueError as error:  # its grammar, its characters, or a number of too many digits
        raise JobError([f"not TOML: {error}"], path) from error
    except RecursionError as error:
        raise JobError([f"nested too deep; expected {what}"], path) from error
    if _is_deeper(table, _DEEPEST):
        raise JobError([f"nested too deep; expected {what}"], path)
    return table


def _is_deeper(value: object, depth: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(depth == 0 or _is_deeper(part, depth - 1) for part in inside)
