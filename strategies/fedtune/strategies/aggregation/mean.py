"""A weighted mean over owners: clients of different rank train different indices, each divided by its own weight.

    x_j += Σ_{i owns j} w_i·Δ_ij / Σ_{i owns j} w_i

Dividing by the whole cohort's weight instead, as zero-padding does, shrinks the indices that few clients train. An
index without an owner in a round stays as it is. Tiers are nested, so the sums are kept slice by slice, each with one
weight.

The sum streams, in memory of one vector, and does not depend on the order of arrival. Floating-point addition is not
associative, so a running float sum would differ with the order in which clients answer, and a run would not repeat bit
for bit. In fixed point it is exact:

    S = Σ_i w_i · rint(x_i · 2^F)        int64, F = FRACTION_BITS
    mean = S / (2^F · Σ_i w_i)           float64, rounded once to float32

Bounds: |x_i| <= MAX_VALUE = 2^4 and Σ w_i <= MAX_WEIGHT = 2^24 give |S| <= 2^(4 + 34 + 24) = 2^62 < 2^63, so the sum
cannot wrap. The step 2^-34 (6e-11) is below the rounding of a float32 of 1e-3, the size of LoRA updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import Indices, Vector, factor_letters
from fedtune.core.errors import UpdateError
from fedtune.core.job.methods import Method
from fedtune.strategies.aggregation.aggregator import Aggregate, Frame, Update

FRACTION_BITS = 34
MAX_VALUE = 2.0**4
MAX_WEIGHT = 2**24


@dataclass(frozen=True)
class Mean:
    """Averages the trained factors, index by index, over the owners.

    With both factors that is FedIT (Zhang et al. 2023): mean(B)·mean(A) is not mean(B·A), and the cross terms are an
    error that grows with how far clients drift apart. With one factor, the other frozen and equal everywhere, it is
    exact: RoLoRA (Chen et al. 2024) alternates between them, B first, since A has no gradient while B is zero; FFA-LoRA
    (Sun et al. 2024) trains B alone, and ΔW never leaves the row space of a random A. In FedRot-LoRA clients rotate
    their factors towards the received ones before they send them, which changes no product B·A = (B·Q)(Qᵀ·A).

    Args:
        method: declares which factors rounds train, and whether devices align.
    """

    method: Method

    def begin(self, frame: Frame) -> MeanOfOwners:
        """Returns an empty mean."""
        return MeanOfOwners(frame)


class MeanOfOwners:
    """Σ w_i·Δ_i / Σ w_i over each index's owners, exact in any order of arrival."""

    def __init__(self, frame: Frame) -> None:
        self._size = frame.size
        start = frame.layout.segment(frame.factors).start
        # For each slice: the smallest tier that owns it, its indices in the segment, and its sum.
        self._slices: list[tuple[int, Indices | slice, ExactSum]] = []
        for each in frame.slices:
            indices = np.concatenate(
                [
                    frame.layout.segment(letter).start - start + each.coordinates(frame.layout, letter)
                    for letter in factor_letters(frame.factors)
                ]
            )
            self._slices.append((each.tier, indices, ExactSum(len(indices))))
        if not frame.slices:
            self._slices.append((0, slice(None), ExactSum(self._size)))

    def add(self, update: Update) -> None:
        """Adds one client's update; values at indices that its tier does not own are ignored.

        Raises:
            UpdateError: the tier is none of this round's, or the update cannot be added; the sums are unchanged.
        """
        tiers = [smallest for smallest, _, _ in self._slices]
        if update.tier not in tiers:
            raise UpdateError(f"an update of tier {update.tier}; this round has the tiers {tiers}")
        if update.values.shape != (self._size,):
            raise UpdateError(f"an update of {update.values.size} values; expected {self._size}")
        owned = [(total, update.values[each]) for smallest, each, total in self._slices if smallest <= update.tier]
        for total, part in owned:
            total.check(part, update.weight)
        for total, part in owned:
            total.add_checked(part, update.weight)

    def merge(self, other: MeanOfOwners) -> None:
        """Adds the other's sums, which gives the same bits as adding its updates one by one."""
        pairs = [(own, theirs) for (_, _, own), (_, _, theirs) in zip(self._slices, other._slices, strict=True)]
        for own, theirs in pairs:
            own.check_weight(theirs.weight, least=0)
        for own, theirs in pairs:
            own.merge(theirs)

    def finish(self) -> Aggregate:
        """Returns the mean over the segment; zero at indices without an owner."""
        mean = np.zeros(self._size, dtype=np.float32)
        for _, indices, total in self._slices:
            mean[indices] = total.mean()
        return Aggregate(mean)


class ExactSum:
    """The running sum of weighted vectors of one length."""

    def __init__(self, size: int) -> None:
        self.weight = 0
        self._sum: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)

    def add(self, vector: Vector, weight: int) -> None:
        """Adds weight · vector.

        Args:
            vector: float32, the sum's length.
            weight: at least 1.

        Raises:
            UpdateError: a value is not finite or too large, the length or the weight is wrong; the sum is unchanged.
        """
        self.check(vector, weight)
        self.add_checked(vector, weight)

    def add_checked(self, vector: Vector, weight: int) -> None:
        """Adds weight · vector after `check` has accepted them."""
        scaled = np.multiply(vector, 2.0**FRACTION_BITS, dtype=np.float64)
        np.rint(scaled, out=scaled)
        fixed = scaled.astype(np.int64)
        fixed *= weight
        self._sum += fixed
        self.weight += weight

    def merge(self, other: ExactSum) -> None:
        """Adds another sum of vectors of the same length."""
        self.check_weight(other.weight, least=0)
        self._sum += other._sum
        self.weight += other.weight

    def check(self, vector: Vector, weight: int) -> None:
        """Raises UpdateError unless `add` would accept the vector and weight."""
        if vector.shape != self._sum.shape:
            raise UpdateError(f"an update of {vector.size} values; expected {self._sum.size}")
        self.check_weight(weight)
        largest = float(np.abs(vector).max(initial=0.0))
        if not largest <= MAX_VALUE:  # also refuses NaN
            raise UpdateError(f"an update with a value of {largest}; expected at most {MAX_VALUE:g}")

    def check_weight(self, weight: int, least: int = 1) -> None:
        """Raises UpdateError where the weight is too small, or the total would exceed MAX_WEIGHT."""
        if weight < least or self.weight + weight > MAX_WEIGHT:
            raise UpdateError(f"weight {weight} on top of {self.weight}; expected at least 1 and {MAX_WEIGHT} in all")

    def mean(self) -> Vector:
        """Returns Σ w·x / Σ w as float32; zeros for an empty sum."""
        if self.weight == 0:
            return np.zeros(self._sum.shape, dtype=np.float32)
        return (self._sum / (2.0**FRACTION_BITS * self.weight)).astype(np.float32)
