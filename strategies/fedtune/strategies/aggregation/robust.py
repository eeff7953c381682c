"""Reductions that a few absurd or hostile updates cannot steer, in the clear, around any linear aggregator.

    Robust(FedAvg(), CoordinateMedian())        the inner one says what a round trains, the rule reduces

Each looks at single updates, so none works under secure aggregation; all but the clipping hold the whole cohort's
updates at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.adapter.tiers import RankSlice
from fedtune.strategies.aggregation.aggregator import NOTHING, Accumulator, Aggregator, State
from fedtune.strategies.aggregation.exact_sum import ExactSum

Stack = npt.NDArray[np.float32]  # (clients, parameters)
Weights = npt.NDArray[np.int64]


class Rule(Protocol):
    """From a cohort's updates to one."""

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """The aggregate, float32, (parameters,).

        Args:
            updates: at least one.
            selecting: the parameters by which a rule that compares whole updates compares them: one factor's.
        """


@dataclass(frozen=True)
class CoordinateMedian:
    """The median of every coordinate (Yin et al. 2018); every client weighs the same."""

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """Coordinate by coordinate."""
        del weights, selecting
        median: Vector = np.median(updates, axis=0).astype(np.float32)
        return median


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every coordinate without its largest and smallest values (Yin et al. 2018), each weighing the same.

    Args:
        share: of the clients, cut off at either end; below one half.
    """

    share: float

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """Coordinate by coordinate."""
        del weights, selecting
        count = len(updates)
        cut = min(int(self.share * count), (count - 1) // 2)
        kept = np.sort(updates, axis=0)[cut : count - cut]
        mean: Vector = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


@dataclass(frozen=True)
class MultiKrum:
    """The weighted mean of the n - f updates that lie closest to their neighbours (Blanchard et al. 2017).

    The score of an update is the sum of its squared distances to its n - f - 2 nearest others. It stands against f
    hostile clients as long as n > 2f + 2; with fewer clients, f is what n allows.

    Args:
        share: f / n, below one half.
    """

    share: float

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """The mean of those that are kept."""
        count = len(updates)
        faulty = min(int(np.ceil(self.share * count)), max((count - 3) // 2, 0))
        kept = krum_order(updates[:, selecting], faulty)[: count - faulty]
        total = ExactSum(updates.shape[1])
        for index in kept:
            total.add(updates[index], int(weights[index]))
        return total.mean()


@dataclass(frozen=True)
class Robust:
    """An aggregator whose mean is replaced by a rule.

    Args:
        inner: linear; it says what rounds train.
    """

    inner: Aggregator
    rule: Rule

    def factors(self, round_number: int) -> Factors:
        """The inner aggregator's."""
        return self.inner.factors(round_number)

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,  # noqa: ARG002 - rules see updates alone
        state: State = NOTHING,  # noqa: ARG002
        slices: Sequence[RankSlice] = (),
    ) -> Accumulator:
        """An empty cohort."""
        if slices:
            raise ValueError("a rule compares whole updates; clients cannot train different ranks")
        return _Cohort(layout, factors, self.rule)


@dataclass(frozen=True)
class NormClipped:
    """An aggregator that is given updates of bounded length: Δ·min(1, c/‖Δ‖) (Sun et al. 2019), as they arrive.

    Args:
        norm: c.
    """

    inner: Aggregator
    norm: float

    def factors(self, round_number: int) -> Factors:
        """The inner aggregator's."""
        return self.inner.factors(round_number)

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,
        state: State = NOTHING,
        slices: Sequence[RankSlice] = (),
    ) -> Accumulator:
        """The inner aggregator's, behind the clipping."""
        return _Clipping(self.inner.accumulator(layout, factors, adapter, state, slices), self.norm)


class _Cohort:
    state: State = NOTHING

    def __init__(self, layout: AdapterLayout, factors: Factors, rule: Rule) -> None:
        segment = layout.segment(factors)
        self._check = ExactSum(segment.stop - segment.start)  # refuses what cannot be added, and only that
        self._updates: list[Vector] = []
        self._weights: list[int] = []
        self._rule = rule
        # Of two factors the second, B: A's deltas are noise while B is still near zero.
        self._selecting = slice(layout.size_a, None) if factors == "ab" else slice(None)

    def add(self, update: Vector, weight: int, tier: int = 0) -> None:
        del tier
        self._check.add(update, weight)
        self._updates.append(update.copy())
        self._weights.append(weight)

    def finish(self) -> Vector:
        if not self._updates:
            return self._check.mean()
        order = _canonical_order(self._updates)
        updates = np.stack([self._updates[index] for index in order])
        weights = np.array([self._weights[index] for index in order], dtype=np.int64)
        return self._rule.reduce(updates, weights, self._selecting)


class _Clipping:
    def __init__(self, inner: Accumulator, norm: float) -> None:
        self._inner = inner
        self._norm = norm

    @property
    def state(self) -> State:
        return self._inner.state

    def add(self, update: Vector, weight: int, tier: int = 0) -> None:
        length = float(np.linalg.norm(update.astype(np.float64)))
        if length > self._norm:
            update = (update * (self._norm / length)).astype(np.float32)
        self._inner.add(update, weight, tier)

    def finish(self) -> Vector:
        return self._inner.finish()


def krum_order(updates: Stack, faulty: int) -> list[int]:
    """Indices of the updates, best score first; ties in their order."""
    count = len(updates)
    wide = updates.astype(np.float64)
    squares = np.einsum("ij,ij->i", wide, wide)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2.0 * (wide @ wide.T), 0.0)
    np.fill_diagonal(distances, np.inf)
    neighbours = max(1, min(count - faulty - 2, count - 1))
    scores = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
    return [int(index) for index in np.argsort(scores, kind="stable")]


def _canonical_order(updates: Sequence[Vector]) -> list[int]:
    """An order that does not depend on which update arrived first."""
    return sorted(range(len(updates)), key=lambda index: updates[index].tobytes())
