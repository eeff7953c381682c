"""The table of metrics by which a run may be judged (evaluation.metric): their names, and how their figures read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MetricName = Literal["exact", "token-f1", "rouge-l", "loss"]


@dataclass(frozen=True)
class Metric:
    """A metric of an evaluation.

    Args:
        label: its name in a sentence.
        generated: whether it compares answers that the model generates; others follow from the scored completions.
        share: whether its figures are shares between 0 and 1, of which more is better.
        meaning: what it measures, as the end of a sentence about a plot.
    """

    label: str
    generated: bool
    share: bool
    meaning: str

    def shown(self, value: float) -> str:
        """Returns a figure for people: "90.0%" or "1.234"."""
        return f"{value:.1%}" if self.share else f"{value:.3f}"

    @property
    def title(self) -> str:
        """The label as the beginning of a line."""
        return self.label[:1].upper() + self.label[1:]


EXACT: MetricName = "exact"
LOSS: MetricName = "loss"
METRICS: Mapping[MetricName, Metric] = {
    EXACT: Metric("exact match", False, True, "the share of examples that the model answers right to the last token"),
    "token-f1": Metric("token F1", True, True, "how far the words of generated and expected answers are the same"),
    "rouge-l": Metric("ROUGE-L", True, True, "the longest common sequence of words of generated and expected answers"),
    LOSS: Metric("loss", False, False, "how surprised the model is by the right answer, in nats a token"),
}
"""The value of evaluation.metric -> its declaration."""


def custom_figure(value: float) -> str:
    """Returns the figure of a user's own metric for people: "0.9", "12.35"; nothing is known of its range."""
    return f"{value:.4g}"
