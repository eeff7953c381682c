"""Aggregators that are a weighted mean of what clients upload: Σ w_i·Δ_i / Σ w_i over the trained segment.

They differ only in what a round trains. Linear means that a sum of updates is all the server needs to see.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.adapter import AdapterLayout, Factors, Vector
from fedtune.strategies.aggregators.base import Accumulator
from fedtune.strategies.exact_sum import ExactSum


@dataclass(frozen=True)
class FedAvg:
    """FedIT (Zhang et al. 2023): averages A and B, each by itself.

    mean(B)·mean(A) is not mean(B·A): the cross terms are an error that grows with how far clients drift apart.
    """

    def factors(self, round_number: int) -> Factors:  # noqa: ARG002 - every round trains both
        """Both, in every round."""
        return "ab"

    def accumulator(self, layout: AdapterLayout, factors: Factors) -> Accumulator:
        """An empty weighted mean."""
        return _WeightedMean(layout, factors)


@dataclass(frozen=True)
class Alternating:
    """RoLoRA (Chen et al. 2024): one factor a round, the other frozen and equal everywhere.

    With A common, mean(B_i)·A = mean(B_i·A) exactly, and half the bytes travel. B goes first: it starts at zero, and
    while it is zero A has no gradient.

    Args:
        period: rounds after which the trained factor changes.
    """

    period: int = 1

    def factors(self, round_number: int) -> Factors:
        """B in rounds 1 … period, A in the next as many, and so on."""
        return "b" if (round_number - 1) // self.period % 2 == 0 else "a"

    def accumulator(self, layout: AdapterLayout, factors: Factors) -> Accumulator:
        """An empty weighted mean."""
        return _WeightedMean(layout, factors)


class _WeightedMean:
    def __init__(self, layout: AdapterLayout, factors: Factors) -> None:
        segment = layout.segment(factors)
        self._sum = ExactSum(segment.stop - segment.start)

    def add(self, update: Vector, weight: int) -> None:
        self._sum.add(update, weight)

    def finish(self) -> Vector:
        return self._sum.mean()
