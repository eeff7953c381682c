"""Plots of several runs together, with one line a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedtune.core.metrics import EXACT, METRICS, MetricName
from fedtune.server.report.canvas import LINES, Plot, curve, draw, plausible, round_axis, share_axis
from fedtune.server.report.reading import Round, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BYTES_PER_MB = 1e6


def comparison_plots(runs: Sequence[Run], labels: Sequence[str]) -> list[Plot]:
    """Draws the runs' metric by round, by bytes and by time, and loss by round.

    Runs that are judged by different metrics are compared by exact match, which all of them have.
    """
    metrics = {run.metric for run in runs if run.evaluations}
    metric = metrics.pop() if len(metrics) == 1 else EXACT
    quality = METRICS[metric]
    plots = (
        _by_round(runs, labels, metric),
        _loss(runs, labels),
        _by_cost(
            runs,
            labels,
            metric,
            f"{quality.title} by bytes",
            f"{quality.title} against all bytes moved until then: of two lines, the one further left needed fewer "
            "bytes.",
            "MB moved, both ways",
            lambda line: (line.traffic.up + line.traffic.down) / BYTES_PER_MB,
        ),
        _by_cost(
            runs,
            labels,
            metric,
            f"{quality.title} by time",
            f"{quality.title} against the time spent in rounds, without the server's evaluations: of two lines, the "
            "one further left was faster.",
            "seconds",
            lambda line: line.seconds,
        ),
    )
    return [plot for plot in plots if plot is not None]


def _by_round(runs: Sequence[Run], labels: Sequence[str], metric: MetricName) -> Plot | None:
    def finish(axes: Axes) -> None:
        _scale(axes, metric)
        round_axis(axes, 0, _last_round(runs))

    quality = METRICS[metric]
    lines = [[(float(number), value) for number, value in _values(run, metric)] for run in runs]
    words = f"{quality.title} on the server's examples: {quality.meaning}; {_better(metric)} is better."
    return _lines(f"{quality.title} by round", words, lines, labels, finish)


def _by_cost(
    runs: Sequence[Run],
    labels: Sequence[str],
    metric: MetricName,
    title: str,
    words: str,
    unit: str,
    cost: Callable[[Round], float],
) -> Plot | None:
    def finish(axes: Axes) -> None:
        _scale(axes, metric)
        axes.set_xlabel(unit)

    lines = []
    for run in runs:
        spent = itertools.accumulate(cost(line) for line in run.rounds)
        until = {line.round: total for line, total in zip(run.rounds, spent, strict=True)}
        lines.append([(until.get(number, 0.0), value) for number, value in _values(run, metric)])
    return _lines(title, words, lines, labels, finish)


def _values(run: Run, metric: MetricName) -> list[tuple[int, float]]:
    """Returns a run's figures of a metric by round, without those that cannot be plotted."""
    scores = [(number, score.value(metric)) for number, score in run.evaluations]
    values, _ = plausible(value for _, value in scores)
    return [(number, value) for (number, _), value in zip(scores, values, strict=True) if not math.isnan(value)]


def _scale(axes: Axes, metric: MetricName) -> None:
    if METRICS[metric].share:
        share_axis(axes)
    else:
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per token")


def _better(metric: MetricName) -> str:
    return "higher" if METRICS[metric].share else "lower"


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
