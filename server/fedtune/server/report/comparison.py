"""Plots of several runs together, with one line a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedtune.server.report.canvas import LINES, Plot, curve, draw, plausible, round_axis, share_axis
from fedtune.server.report.reading import Round, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BYTES_PER_MB = 1e6


def comparison_plots(runs: Sequence[Run], labels: Sequence[str]) -> list[Plot]:
    """Draws exact match by round, by bytes and by time, and loss by round."""
    plots = (
        _exact_match(runs, labels),
        _loss(runs, labels),
        _exact_match_by_cost(
            runs,
            labels,
            "Exact match by bytes",
            "Exact match against all bytes moved until then: of two lines, the one further left needed fewer bytes.",
            "MB moved, both ways",
            lambda line: (line.traffic.up + line.traffic.down) / BYTES_PER_MB,
        ),
        _exact_match_by_cost(
            runs,
            labels,
            "Exact match by time",
            "Exact match against the time spent in rounds, without the server's evaluations: of two lines, the one "
            "further left was faster.",
            "seconds",
            lambda line: line.seconds,
        ),
    )
    return [plot for plot in plots if plot is not None]


def _exact_match(runs: Sequence[Run], labels: Sequence[str]) -> Plot | None:
    def finish(axes: Axes) -> None:
        share_axis(axes)
        round_axis(axes, 0, _last_round(runs))

    lines = [[(float(number), score.exact_match) for number, score in run.evaluations] for run in runs]
    words = "The share of the server's examples that each run answers right to the last token; higher is better."
    return _lines("Exact match by round", words, lines, labels, finish)


def _exact_match_by_cost(
    runs: Sequence[Run], labels: Sequence[str], title: str, words: str, unit: str, cost: Callable[[Round], float]
) -> Plot | None:
    def finish(axes: Axes) -> None:
        share_axis(axes)
        axes.set_xlabel(unit)

    lines = []
    for run in runs:
        spent = itertools.accumulate(cost(line) for line in run.rounds)
        until = {line.round: total for line, total in zip(run.rounds, spent, strict=True)}
        lines.append([(until.get(number, 0.0), score.exact_match) for number, score in run.evaluations])
    return _lines(title, words, lines, labels, finish)


def _loss(runs: Sequence[Run], labels: Sequence[str]) -> Plot | None:
    def finish(axes: Axes) -> None:
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per token")
        round_axis(axes, 1, _last_round(runs))

    lines = []
    for run in runs:
        losses, _ = plausible(line.train_loss for line in run.rounds)
        lines.append([(float(line.round), loss) for line, loss in zip(run.rounds, losses, strict=True)])
    words = "Mean training loss of each run's clients on their own data; lower is better."
    return _lines("Training loss by round", words, lines, labels, finish)


def _lines(
    title: str,
    words: str,
    lines: Sequence[Sequence[tuple[float, float]]],
    labels: Sequence[str],
    finish: Callable[[Axes], None],
) -> Plot | None:
    if not any(lines):
        return None

    def paint(axes: Axes) -> None:
        for line, label, colour in zip(lines, labels, itertools.cycle(LINES), strict=False):
            if line:
                places, values = zip(*line, strict=True)
                curve(axes, places, values, colour, label)
        finish(axes)

    return draw(title, words, paint)


def _last_round(runs: Sequence[Run]) -> int:
    return max((run.rounds[-1].round for run in runs if run.rounds), default=1)
