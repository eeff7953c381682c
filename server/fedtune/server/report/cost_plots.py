"""Plots of a run's quality against what had been spent until then: operations, energy, bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedtune.core.metrics import METRICS
from fedtune.server.costs.cost_ledger import Cost
from fedtune.server.report.canvas import ORANGE, Plot, curve, draw, plausible, share_axis
from fedtune.server.report.reading import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cost_plots(run: Run) -> list[Plot]:
    """Draws the run's metric against each kind of cost that the run's rounds have."""
    total = run.ledger.total
    plots = []
    if total.flops:
        plots.append(_against(run, "operations", "GFLOP, counted", lambda cost: cost.flops / 1e9))
    if total.joules and run.ledger.energy:
        unit = f"kJ, {run.ledger.energy}"
        plots.append(_against(run, "energy", unit, lambda cost: (cost.joules or 0.0) / 1e3))
    if total.bytes:
        plots.append(_against(run, "bytes", "MB moved, both ways", lambda cost: cost.bytes / 1e6))
    return [plot for plot in plots if plot is not None]


def _against(run: Run, what: str, unit: str, of: Callable[[Cost], float]) -> Plot | None:
    """Draws the metric against one kind of cost."""
    metric, spent = METRICS[run.metric], run.ledger.until()
    before = [(0.0, run.summary.eval_before)] if run.summary and run.summary.eval_before else []
    scores = [*before, *((of(spent[number]), score) for number, score in run.ledger.scores)]
    points = [(cost, value) for cost, score in scores if (value := score.value(run.metric)) is not None]
    if len(points) < 2:
        return None
    values, _ = plausible(value for _, value in points)

    def paint(axes: Axes) -> None:
        curve(axes, [cost for cost, _ in points], values, ORANGE, metric.label)
        if metric.share:
            share_axis(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)

    better = "The steeper the line, the less a point costs." if metric.share else "Lower is better."
    words = f"{metric.title} against all {what} spent until then, evaluations included. {better}"
    return draw(f"{metric.title} by {what}", words, paint)
