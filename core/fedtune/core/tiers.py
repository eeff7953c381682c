"""Devices of different rank on one adapter: which rank indices each trains, and where those lie in the flat vector.

A public permutation π_t of the R rank indices follows from the job's seed and the turn t. A device of tier r owns
I_r = π_t[:r]: it loads the whole adapter, and trains rows I_r of A or columns I_r of B; the rest stays frozen in its
forward pass. Tiers are nested, so what a small device trains is trained by all larger ones too, and over the turns
every device trains every index.

    owned = rank_indices(seed, turn, layout.rank, tier)
    places = coordinates(layout, "b", owned)               # of the factor, ascending
    update[places]                                         # what such a device uploads
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter import AdapterLayout, Factor
from fedtune.core.seeds import generator

Indices = npt.NDArray[np.intp]


def rank_indices(seed: int, turn: int, rank: int, tier: int) -> Indices:
    """I_r of a turn: int, (tier,), ascending.

    Args:
        seed: the job's.
        turn: how many rounds before this one trained the factor.
        rank: R.
        tier: r, from 1 to R.
    """
    if not 1 <= tier <= rank:
        raise ValueError(f"a tier of {tier} rank indices; expected 1 to {rank}")
    return np.sort(generator(seed, "tiers", turn).permutation(rank)[:tier])


def coordinates(layout: AdapterLayout, factor: Factor, owned: Indices) -> Indices:
    """Where the owned rank indices lie within a factor's segment: int, ascending, from 0.

    Rows of every A, (R, d_in) row-major, or columns of every B, (d_out, R).
    """
    parts, start = [], 0
    for module in layout.modules:
        if factor == "a":
            grid = owned[:, None] * module.d_in + np.arange(module.d_in)
            size = layout.rank * module.d_in
        else:
            grid = np.arange(module.d_out)[:, None] * layout.rank + owned
            size = layout.rank * module.d_out
        parts.append(start + grid.reshape(-1))
        start += size
    return np.concatenate(parts)


def slices(seed: int, turn: int, rank: int, tiers: Sequence[int]) -> list[tuple[int, Indices]]:
    """The rank indices that each tier adds to the next smaller one: (tier, ascending indices), smallest tier first.

    What several tiers own in common is one slice, so that one sum, masked or not, has one set of owners: slice k is
    owned by all devices of tier k and above.
    """
    order = generator(seed, "tiers", turn).permutation(rank)
    bounds = [0, *sorted(set(tiers))]
    return [(high, np.sort(order[low:high])) for low, high in pairwise(bounds)]


def merged_tiers(counts: dict[int, int], least: int) -> dict[int, int]:
    """Tier -> tier it trains as, so that every slice has at least `least` owners; 0 where it sits out.

    A slice is owned by its tier and all above. Where a tier and those above it are too few, they train as the next
    smaller one; where even all together are too few, nobody trains.

    Args:
        counts: tier -> devices of it in the cohort.
        least: n_min of secure aggregation, at least 1.
    """
    trained, owners = {}, 0
    waiting: list[int] = []
    for tier in sorted(counts, reverse=True):
        owners += counts[tier]
        waiting.append(tier)
        if owners >= least:
            trained.update(dict.fromkeys(waiting, tier))
            waiting = []
    trained.update(dict.fromkeys(waiting, 0))
    return trained
