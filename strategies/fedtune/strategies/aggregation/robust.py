"""Robust aggregations, which a few invalid or hostile updates cannot steer.

    Robust(inner.method, CoordinateMedian())        a rule in place of the mean
    Clipped(Mean(method), norm=1.0)                 clips updates for any inner aggregator

Each needs single updates: in the clear those of clients, under secure aggregation the means of groups (`grouped`). All
except clipping hold the whole cohort's updates at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import Vector
from fedtune.core.job.methods import CLIPPING, RULE, Method
from fedtune.strategies.aggregation.aggregator import Aggregate, Aggregation, Aggregator, Frame, Update
from fedtune.strategies.aggregation.mean import ExactSum

Stack = npt.NDArray[np.float32]  # (clients, parameters)
Weights = npt.NDArray[np.int64]


class Rule(Protocol):
    """A robust rule that reduces a cohort's updates to one."""

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """Returns the aggregate, float32, (parameters,).

        Args:
            updates: stacked updates, at least one.
            weights: int64, (clients,).
            selecting: the parameters, one factor's, by which a rule that compares whole updates compares them.
        """


@dataclass(frozen=True)
class CoordinateMedian:
    """The median of every coordinate (Yin et al. 2018), with equal weights."""

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """Returns the median coordinate by coordinate."""
        del weights, selecting
        median: Vector = np.median(updates, axis=0).astype(np.float32)
        return median


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of every coordinate without its largest and smallest values (Yin et al. 2018), with equal weights.

    Args:
        share: share of the clients to cut off at either end; below one half.
    """

    share: float

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """Returns the trimmed mean coordinate by coordinate."""
        del weights, selecting
        count = len(updates)
        cut = min(int(self.share * count), (count - 1) // 2)
        kept = np.sort(updates, axis=0)[cut : count - cut]
        mean: Vector = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


@dataclass(frozen=True)
class MultiKrum:
    """The weighted mean of the n - f updates that lie closest to their neighbours (Blanchard et al. 2017).

    The score of an update is the sum of its squared distances to its n - f - 2 nearest others. It resists f hostile
    clients as long as n > 2f + 2; with fewer clients, f is the largest number that n allows.

    Args:
        share: f / n, below one half.
    """

    share: float

    def reduce(self, updates: Stack, weights: Weights, selecting: slice) -> Vector:
        """Returns the weighted mean of the kept updates."""
        count = len(updates)
        faulty = min(int(np.ceil(self.share * count)), max((count - 3) // 2, 0))
        kept = krum_order(updates[:, selecting], faulty)[: count - faulty]
        total = ExactSum(updates.shape[1])
        for index in kept:
            total.add(updates[index], int(weights[index]))
        return total.mean()


@dataclass(frozen=True)
class Robust:
    """An aggregator that reduces updates by a rule.

    Args:
        declared: method of the aggregation whose mean the rule replaces.
    """

    declared: Method
    rule: Rule

    @property
    def method(self) -> Method:
        """The aggregation's method, with the needs of a rule."""
        return self.declared.within(RULE)

    def begin(self, frame: Frame) -> Cohort:
        """Returns an empty cohort."""
        if frame.slices:
            raise ValueError("a rule compares whole updates; clients cannot train different ranks")
        return Cohort(frame, self.rule)


class Cohort:
    """The updates of a round, collected until a rule reduces them."""

    def __init__(self, frame: Frame, rule: Rule) -> None:
        self._check = ExactSum(frame.size)  # refuses exactly the updates that a sum refuses
        self._updates: list[Update] = []
        self._rule = rule
        self._selecting = compared(frame)

    def add(self, update: Update) -> None:
        """Keeps one client's update.

        Raises:
            UpdateError: no sum could take it.
        """
        self._check.add(update.values, update.weight)
        self._updates.append(replace(update, values=update.values.copy()))

    def merge(self, other: Cohort) -> None:
        """Adds the other's updates."""
        self._check.merge(other._check)
        self._updates += other._updates

    def finish(self) -> Aggregate:
        """Returns the rule's aggregate."""
        if not self._updates:
            return Aggregate(self._check.mean())
        ordered = sorted(self._updates, key=lambda update: update.values.tobytes())  # in any order of arrival
        updates = np.stack([update.values for update in ordered])
        weights = np.array([update.weight for update in ordered], dtype=np.int64)
        return Aggregate(self._rule.reduce(updates, weights, self._selecting))


@dataclass(frozen=True)
class Clipped:
    """Clips updates for an inner aggregator as they arrive: Δ·min(1, c/‖Δ‖) (Sun et al. 2019).

    Args:
        norm: c.
    """

    inner: Aggregator[Update]
    norm: float

    @property
    def method(self) -> Method:
        """The inner aggregator's method, with the needs of clipping."""
        return self.inner.method.within(CLIPPING)

    def begin(self, frame: Frame) -> Clipping:
        """Returns the inner aggregator's aggregation behind the clipping."""
        return Clipping(self.inner.begin(frame), self.norm)


class Clipping:
    """Clips updates on their way into another aggregation."""

    def __init__(self, inner: Aggregation[Update], norm: float) -> None:
        self._inner = inner
        self._norm = norm

    def add(self, update: Update) -> None:
        """Adds the update, scaled down to the norm if it is longer."""
        length = float(np.linalg.norm(update.values.astype(np.float64)))
        if length > self._norm:
            update = replace(update, values=(update.values * (self._norm / length)).astype(np.float32))
        self._inner.add(update)

    def merge(self, other: Clipping) -> None:
        """Merges the inner aggregations, whose updates are clipped already."""
        self._inner.merge(other._inner)

    def finish(self) -> Aggregate:
        """Returns the inner aggregate."""
        return self._inner.finish()


def compared(frame: Frame) -> slice:
    """Returns the parameters by which whole updates are compared.

    With both factors it is B: A's deltas are noise while B is still near zero.
    """
    return frame.layout.segment("b") if frame.factors == "ab" else slice(None)


def krum_order(updates: Stack, faulty: int) -> list[int]:
    """Returns the indices of the updates, best score first; ties keep their order."""
    count = len(updates)
    wide = updates.astype(np.float64)
    squares = np.einsum("ij,ij->i", wide, wide)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2.0 * (wide @ wide.T), 0.0)
    np.fill_diagonal(distances, np.inf)
    neighbours = max(1, min(count - faulty - 2, count - 1))
    scores = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
    return [int(index) for index in np.argsort(scores, kind="stable")]
