"""A mean over owners: clients of different rank train different indices, and each index is divided by its own weight.

    x_j += Σ_{i owns j} w_i·Δ_ij / Σ_{i owns j} w_i

Dividing by the whole cohort's weight instead, as zero-padding does, shrinks what few devices train. An index that
nobody owned in a round stays as it is. Tiers are nested, so the sums are kept slice by slice: one slice, one weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector, factor_letters
from fedtune.core.adapter.tiers import Indices, RankSlice, coordinates
from fedtune.core.errors import UpdateError
from fedtune.strategies.aggregation.aggregator import NOTHING, State
from fedtune.strategies.aggregation.exact_sum import ExactSum


class OwnedMean:
    """Σ w_i·Δ_i / Σ w_i over each index's owners, exact in any order of arrival.

    Args:
        slices: of the rank indices, smallest tier first; none where everybody owns all.
    """

    state: State = NOTHING

    def __init__(self, layout: AdapterLayout, factors: Factors, slices: Sequence[RankSlice] = ()) -> None:
        segment = layout.segment(factors)
        self._size = segment.stop - segment.start
        # Of each slice: the smallest tier that owns it, its places in the segment, and its sum.
        self._slices: list[tuple[int, Indices | slice, ExactSum]] = []
        for each in slices:
            indices = np.concatenate(
                [
                    layout.segment(letter).start - segment.start + coordinates(layout, letter, each.owned)
                    for letter in factor_letters(factors)
                ]
            )
            self._slices.append((each.tier, indices, ExactSum(len(indices))))
        if not slices:
            self._slices.append((0, slice(None), ExactSum(self._size)))

    def add(self, update: Vector, weight: int, tier: int = 0) -> None:
        """Takes one client's update in.

        Args:
            update: over the whole segment; what the tier does not own is not looked at.
            tier: one of the slices' tiers; 0 where there are none.

        Raises:
            UpdateError: the tier is none of this round's, or the update cannot be added; nothing was.
        """
        tiers = [smallest for smallest, _, _ in self._slices]
        if tier not in tiers:
            raise UpdateError(f"an update of tier {tier}; this round has the tiers {tiers}")
        if update.shape != (self._size,):
            raise UpdateError(f"an update of {update.size} values; expected {self._size}")
        owned = [(total, update[indices]) for smallest, indices, total in self._slices if smallest <= tier]
        for total, part in owned:
            total.check(part, weight)
        for total, part in owned:
            total.add(part, weight)

    def finish(self) -> Vector:
        """The aggregate over the segment, float32; zero where nobody owned."""
        aggregate = np.zeros(self._size, dtype=np.float32)
        for _, indices, total in self._slices:
            aggregate[indices] = total.mean()
        return aggregate
