"""Stochastic rounding to whole numbers whose norm is bounded, so that noise need not cover rare roundings.

    whole = round_bounded(values, longest_rounded(most, values.size), stream)

Rounding each value up or down without bias lengthens a vector of norm g by less than √d, and nearly always by much
less. A rounding above

    Δ² = min((g + √d)², g² + d/4 + √(2·ln(1/β))·(g + √d/2)),    β = exp(-1/2)

is drawn again; one in β is at most (Kairouz, Liu and Steinke, 2021, proposition 22). What is drawn again makes the
rounding a little biased, by less than its own spread.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.privacy.discrete_gaussian import Stream, Whole

_AGAIN = 1.0  # √(2·ln(1/β)) for β = exp(-1/2)
_FRACTION_BITS = 32
_ROUND_OFF = 1.0 + 1e-6  # the norm of float32 values may be this much above the clip


def longest_rounded(most: float, count: int) -> float:
    """Returns Δ for vectors of `count` values of norm at most `most`, in units of the grid."""
    most *= _ROUND_OFF
    usual = most**2 + count / 4 + _AGAIN * (most + sqrt(count) / 2)
    return min(most + sqrt(count), sqrt(usual))


def round_bounded(values: NDArray[np.float32], longest: float, stream: Stream) -> Whole:
    """Rounds values stochastically: int64, of the same shape, with a norm of at most `longest`.

    Args:
        values: shape (count,), in units of the grid, of a norm for which `longest` is that of `longest_rounded`.
    """
    exact = values.astype(np.float64)
    floors = np.floor(exact)
    thresholds = ((exact - floors) * 2.0**_FRACTION_BITS).astype(np.uint64)
    while True:
        drawn = stream.draw(values.size) >> np.uint64(64 - _FRACTION_BITS)
        rounded = floors.astype(np.int64) + (drawn < thresholds)
        if int(np.square(rounded).sum()) <= longest**2:
            return rounded
