"""A run's rounds as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from fedtune.core.errors import InputError


def rounds_frame(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Returns one row for each line of rounds.jsonl, with the round's number as the index.

    Columns: seconds, train_loss, loss and exact_match where the server evaluated, clients, survivors, bytes_up,
    bytes_down, aborted.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise InputError("a DataFrame needs pandas. Install it with: pip install pandas") from error
    return pandas.DataFrame([_row(line) for line in lines], columns=["round", *_COLUMNS]).set_index("round")


_COLUMNS = (
    *("seconds", "train_loss", "loss", "exact_match", "clients", "survivors", "bytes_up", "bytes_down", "aborted"),
)


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    scored = line["eval"] or {}
    return {
        "round": line["round"],
        "seconds": line["seconds"],
        "train_loss": line["train_loss"],
        "loss": scored.get("loss"),
        "exact_match": scored.get("exact_match"),
        "clients": len(line["cohort"]),
        "survivors": len(line["survivors"]),
        "bytes_up": line["bytes"]["up"],
        "bytes_down": line["bytes"]["down"],
        "aborted": line["aborted"],
    }
