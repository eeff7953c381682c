"""Aggregators that are a weighted mean of what clients upload: Σ w_i·Δ_i / Σ w_i, index by index, over its owners.

They differ in what a round trains, and in what a client does to its update before it sends it. Linear means that a sum
of updates is all the server needs to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.adapter.tiers import RankSlice
from fedtune.strategies.aggregation.aggregator import NOTHING, Accumulator, State
from fedtune.strategies.aggregation.owned import OwnedMean


@dataclass(frozen=True)
class FedAvg:
    """FedIT (Zhang et al. 2023): averages A and B, each by itself.

    mean(B)·mean(A) is not mean(B·A): the cross terms are an error that grows with how far clients drift apart.
    """

    def factors(self, round_number: int) -> Factors:  # noqa: ARG002 - every round trains both
        """Both, in every round."""
        return "ab"

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,  # noqa: ARG002 - linear in the update
        state: State = NOTHING,  # noqa: ARG002
        slices: Sequence[RankSlice] = (),
    ) -> Accumulator:
        """An empty weighted mean."""
        return OwnedMean(layout, factors, slices)


@dataclass(frozen=True)
class FedRot(FedAvg):
    """FedRot-LoRA: clients turn their factors towards the last global ones before they send them; then FedAvg.

    B·A = (B·Q)(Qᵀ·A) for every orthogonal Q, so what a client learned stays as it is, and factors of different clients
    that mean the same come to lie in the same place. The turning is in `fedtune.core.adapter.alignment`; the server's
    part is a mean like any other. All clients need the same rank.
    """


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

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,  # noqa: ARG002 - linear in the update
        state: State = NOTHING,  # noqa: ARG002
        slices: Sequence[RankSlice] = (),
    ) -> Accumulator:
        """An empty weighted mean."""
        return OwnedMean(layout, factors, slices)


@dataclass(frozen=True)
class Frozen(Alternating):
    """FFA-LoRA (Sun et al. 2024): A stays for ever as the job's seed made it, and B is averaged.

    Exact, and half of FedAvg's bytes; but ΔW never leaves the row space of a random A.
    """

    def factors(self, round_number: int) -> Factors:  # noqa: ARG002 - every round trains the same
        """B, in every round."""
        return "b"
