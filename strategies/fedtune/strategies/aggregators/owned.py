"""A mean over owners: clients of different rank train different indices, and each index is divided by its own weight.

    x_j += Σ_{i owns j} w_i·Δ_ij / Σ_{i owns j} w_i

Dividing by the whole cohort's weight instead, as zero-padding does, shrinks what few devices train. An index that
nobody owned in a round stays as it is. Tiers are nested, so the sums are kept slice by slice: one slice, one weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.core.adapter import AdapterLayout, Factor, Vector
from fedtune.core.errors import UpdateError
from fedtune.core.tiers import coordinates, slices
from fedtune.strategies.exact_sum import ExactSum


class OwnedMean:
    """The reduction of one factor in one round of mixed ranks.

    Args:
        tiers: ranks that clients of this round may train, the same list for all.
        seed, turn: of the permutation.
    """

    def __init__(self, layout: AdapterLayout, factor: Factor, tiers: Sequence[int], seed: int, turn: int) -> None:
        segment = layout.segment(factor)
        self._size = segment.stop - segment.start
        # Of each slice: the smallest tier that owns it, its places in the factor, and its sum.
        self._slices = [
            (tier, places, ExactSum(len(places)))
            for tier, owned in slices(seed, turn, layout.rank, tiers)
            for places in [coordinates(layout, factor, owned)]
        ]
        self._places = {
            tier: np.sort(np.concatenate([places for other, places, _ in self._slices if other <= tier]))
            for tier, _, _ in self._slices
        }

    def add(self, update: Vector, weight: int, tier: int) -> None:
        """Takes one client's update in: its owned coordinates, in their order in the factor.

        Raises:
            UpdateError: the tier is none of this round's, or the update cannot be added; nothing was.
        """
        if tier not in self._places:
            raise UpdateError(f"an update of tier {tier}; this round has the tiers {sorted(self._places)}")
        places = self._places[tier]
        if update.shape != places.shape:
            raise UpdateError(f"an update of {update.size} values; tier {tier} owns {places.size}")
        ExactSum(update.size).add(update, weight)  # refuses before any slice has been changed
        self._slices[0][2].check_weight(weight)  # everybody owns the first slice: its weight is the largest
        for other, owned, total in self._slices:
            if other <= tier:
                total.add(update[np.searchsorted(places, owned)], weight)

    def finish(self) -> Vector:
        """The aggregate over the factor, float32; zero where nobody owned."""
        aggregate = np.zeros(self._size, dtype=np.float32)
        for _, owned, total in self._slices:
            aggregate[owned] = total.mean()
        return aggregate

    @property
    def weights(self) -> dict[int, int]:
        """Slice, by the smallest tier that owns it -> its owners' weight."""
        return {tier: total.weight for tier, _, total in self._slices}
