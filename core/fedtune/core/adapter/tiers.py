"""Tiers: the rank indices that devices of different rank train, and their positions in the flat vector.

A public permutation π_t of the R rank indices follows from the job's seed and the round t. A device of tier r owns
I_r = π_t[:r]: it loads the whole adapter, and trains rows I_r of A and columns I_r of B, or the block I_r x I_r of a
core adapter; the rest stays frozen in its forward pass. Tiers are nested: devices of larger tiers train all values of
the smaller ones, and over the rounds every device trains every index.

    owned = rank_indices(seed, number, layout.rank, tier)
    places = layout.coordinates("b", owned)                # of the factor, ascending
    update[places]                                         # the values that such a device uploads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedtune.core.adapter.layout import AdapterLayout, Factor, Indices
from fedtune.core.seeds import generator


@dataclass(frozen=True, eq=False)
class RankSlice:
    """The values that a tier trains and the next smaller one does not; all devices of the tier and above own them.

    Args:
        tier: smallest tier that owns them.
        owned: the tier's rank indices; int, ascending.
        inner: the rank indices of the next smaller tier; none for the smallest.
    """

    tier: int
    owned: Indices
    inner: Indices

    def coordinates(self, layout: AdapterLayout, factor: Factor) -> Indices:
        """Returns the positions of these values within a factor's segment: int, ascending, from 0."""
        whole, inner = (layout.coordinates(factor, indices) for indices in (self.owned, self.inner))
        return np.setdiff1d(whole, inner, assume_unique=True)


def rank_indices(seed: int, number: int, rank: int, tier: int) -> Indices:
    """Returns I_r of a round: int, (tier,), ascending.

    Args:
        seed: seed of the job.
        number: number of the round.
        rank: R, the rank of the adapter.
        tier: r, from 1 to R.
    """
    if not 1 <= tier <= rank:
        raise ValueError(f"a tier of {tier} rank indices; expected 1 to {rank}")
    return np.sort(_order(seed, number, rank)[:tier])


def rank_slices(seed: int, number: int, rank: int, tiers: Sequence[int]) -> tuple[RankSlice, ...]:
    """Returns what each tier adds to the next smaller one, smallest tier first.

    Values that the same tiers own form one slice, so that one sum, masked or not, has one set of owners.
    """
    order = _order(seed, number, rank)
    bounds = [0, *sorted(set(tiers))]
    return tuple(RankSlice(high, np.sort(order[:high]), np.sort(order[:low])) for low, high in pairwise(bounds))


def tier_for(rank: int, tiers: Sequence[int]) -> int:
    """Returns the largest of a job's tiers that a device of this rank can train; 0 where it can train none."""
    return max((tier for tier in tiers if tier <= rank), default=0)


def merged_tiers(counts: Mapping[int, int], least: int) -> dict[int, int]:
    """Merges small tiers, so that every tier that is trained has at least `least` clients.

    The owners of a slice are a tier and all above it. Yet every tier must be large enough by itself, since the weights
    of two slices differ by the weight of the tier between them. A tier that is too small trains as the next smaller
    one; where there is none, it and the tiers that were merged into it sit out.

    Args:
        counts: tier -> number of its clients in the cohort.
        least: fewest clients of a tier, at least 1.

    Returns:
        Tier -> the tier as which it trains; 0 where it sits out.
    """
    trained: dict[int, int] = {}
    waiting: list[int] = []
    for tier in sorted(counts, reverse=True):
        waiting.append(tier)
        if sum(counts[each] for each in waiting) >= least:
            trained.update(dict.fromkeys(waiting, tier))
            waiting = []
    trained.update(dict.fromkeys(waiting, 0))
    return trained


def _order(seed: int, number: int, rank: int) -> Indices:
    return generator(seed, "tiers", number).permutation(rank)
