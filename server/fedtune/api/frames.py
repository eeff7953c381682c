"""A run's rounds as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from fedtune.core.errors import InputError


def rounds_frame(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Returns one row for each line of rounds.jsonl, with the round's number as the index.

    Columns: seconds, train_loss, loss and exact_match where the server evaluated, clients, survivors, bytes_up,
    bytes_down, aborted; then evaluation.metric, if it compares generated answers, and custom metrics by their names.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise InputError("a DataFrame needs pandas. Install it with: pip install pandas") from error
    answered = [_answered(line["eval"] or {}) for line in lines]
    columns = dict.fromkeys(("round", *COLUMNS, *(name for figures in answered for name in figures)))
    rows = [_row(line) | figures for line, figures in zip(lines, answered, strict=True)]
    return pandas.DataFrame(rows, columns=list(columns)).set_index("round")


COLUMNS = (
    *("seconds", "train_loss", "loss", "exact_match", "clients", "survivors", "bytes_up", "bytes_down", "aborted"),
)
"""The columns that every frame has."""


def _answered(scored: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of generated answers."""
    custom: dict[str, float] = scored.get("custom", {})  # earlier releases had none
    return custom if scored.get("score") is None else {scored["metric"]: scored["score"], **custom}


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
