"""The finished runs of benchmarks/real, one line of JSON each with all its inputs; and the run that is next.

A row's learning rate is searched on the one grid of all rows. The search begins with two neighbours and goes on towards
the better one until the best rate has a worse one on either side, or the grid ends. It compares exact match on the
validation records, never the records that the table is about.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rows import RATES, Draw, Row

INPUTS = ("base", "task")  # the digests in a line's basis


class Run(NamedTuple):
    """One training of a row."""

    row: Row
    draw: Draw
    rate: float

    @property
    def name(self) -> str:
        client = "" if self.draw.client is None else f"-client-{self.draw.client}"
        return f"{self.row.name}/rate-{self.rate:g}-seed-{self.draw.seed}{client}"


@dataclass(frozen=True)
class Book:
    """The results so far.

    Args:
        path: file of the results.
        inputs: scene -> digests of its base model and of its task's files.
        lines: contents of the file.
    """

    path: Path
    inputs: Mapping[str, Mapping[str, str]]
    lines: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path, inputs: Mapping[str, Mapping[str, str]]) -> Book:
        """Reads the results; a scene whose inputs are not given has those of its last line."""
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        known = {line["basis"]["row"].split("/")[0]: {key: line["basis"][key] for key in INPUTS} for line in lines}
        return cls(path, {**known, **inputs}, lines)

    def outcome(self, run: Run) -> dict[str, Any] | None:
        """Returns a finished run's results; None if it still has to be run."""
        basis = self.basis(run)
        return next((line["outcome"] for line in self.lines if line["basis"] == basis), None)

    def add(self, run: Run, outcome: Mapping[str, Any]) -> None:
        """Writes a finished run's line."""
        line = {"basis": self.basis(run), "outcome": dict(outcome)}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def basis(self, run: Run) -> dict[str, Any]:
        """Returns all on which a run's result depends."""
        row, draw, rate = run
        return {
            "row": row.name,
            "client": draw.client,
            "keys": row.overrides(draw, rate),
            "job": row.scene.job.read_text(encoding="utf-8"),
            **self.inputs[row.scene.name],
        }

    def best_rate(self, row: Row) -> float | None:
        """Returns the learning rate with which the row's tuning runs end best; None before any is done."""
        scores = self._scores(row)
        return max(scores, key=scores.__getitem__) if scores else None

    def next_run(self, row: Row, tune: bool) -> Run | None:
        """Returns the row's next missing run.

        Args:
            tune: whether only the runs that choose the learning rate are wanted.
        """
        rate = self._next_rate(row)
        if rate is not None:
            return next(run for draw in row.tuning if self.outcome(run := Run(row, draw, rate)) is None)
        if tune:
            return None
        best = self.best_rate(row)
        missing = (run for draw in row.draws if self.outcome(run := Run(row, draw, best or 0.0)) is None)
        return next(missing, None)

    def outcomes(self, row: Row) -> dict[Draw, dict[str, Any]]:
        """Returns the results at the row's best rate."""
        best = self.best_rate(row)
        found = {draw: self.outcome(Run(row, draw, best)) for draw in row.draws} if best else {}
        return {draw: outcome for draw, outcome in found.items() if outcome is not None}

    def tuned(self, row: Row) -> bool:
        """Returns whether the row's learning rate is chosen."""
        return self._next_rate(row) is None

    def _next_rate(self, row: Row) -> float | None:
        scores = self._scores(row)
        first, second = (RATES[place] for place in row.first_rates)
        for rate in (first, second):
            if rate not in scores:
                return rate
        best = RATES.index(max(scores, key=scores.__getitem__))
        beside = [RATES[place] for place in (best - 1, best + 1) if 0 <= place < len(RATES)]
        return next((rate for rate in beside if rate not in scores), None)

    def _scores(self, row: Row) -> dict[float, tuple[float, float]]:
        """Returns rate -> (exact match, negative loss) on the validation records, of rates with all tuning runs."""
        scores = {}
        for rate in RATES:
            found = [self.outcome(Run(row, draw, rate)) for draw in row.tuning]
            last = [outcome["curve"][-1] for outcome in found if outcome is not None]
            if len(last) == len(row.tuning):
                scores[rate] = (
                    statistics.fmean(point["exact_match"] for point in last),
                    -statistics.fmean(point["loss"] for point in last),
                )
        return scores


def next_of(book: Book, rows: Sequence[Row]) -> Run | None:
    """Returns the next run of all: first every row's learning rate, then every row's other seeds."""
    for tune in (True, False):
        for row in rows:
            if run := book.next_run(row, tune):
                return run
    return None
