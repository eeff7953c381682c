"""Examples in memory, written as the JSONL files that a run reads: lists of dicts, pandas DataFrames, datasets.Dataset.

    files = write_clients({"kitchen": rows, "hall": frame}, folder)

A run reads files, so that it can be resumed, and so that its processes share no memory with a notebook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.core.errors import InputError

Rows = Iterable[Mapping[str, Any]]
"""Rows of a data file: {"prompt", "completion"}, {"messages"} or {"text"}. A pandas DataFrame counts as its rows."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def write_clients(clients: Mapping[str, Rows], folder: Path) -> str:
    """Writes one file for each client into a new folder, and returns the pattern that matches them.

    Raises:
        InputError: there are no clients, or a name cannot be that of a file.
        DataError: see `read_records`, which a run calls.
    """
    if not clients:
        raise InputError("clients is empty; expected a name and rows for each client")
    if odd := [name for name in clients if not _NAME.fullmatch(name)]:
        raise InputError(f"a client is named {odd[0]!r}; expected letters, digits, dots, dashes and underscores")
    folder.mkdir(parents=True)
    for name, rows in clients.items():
        write_rows(rows, folder / f"{name}.jsonl")
    return str(folder / "*.jsonl")


def write_rows(rows: Rows, path: Path) -> Path:
    """Writes rows as JSONL.

    Raises:
        InputError: a row is not a mapping, or holds something that JSON does not.
    """
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(_mappings(rows), start=1):
            if not isinstance(row, Mapping):
                raise InputError(f"{path.stem}: row {number} is {type(row).__name__}; expected a mapping")
            try:
                file.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise InputError(f"{path.stem}: row {number} cannot be written as JSON: {error}") from error
    return path


def _mappings(rows: Any) -> Iterator[Any]:
    """Yields rows; a DataFrame iterates over its columns otherwise."""
    if hasattr(rows, "itertuples") and hasattr(rows, "to_dict"):
        yield from rows.to_dict("records")
    else:
        yield from rows
