"""The selection of a sparse update's coordinates: a boolean mask over the segment, so no indices need a check.

Each client sends its own largest coordinates, and the entropy coder encodes their positions. The selection is an exact
function of the update: among equal magnitudes the lower position wins, on every machine.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray


def selected_count(count: int, density: float) -> int:
    """Returns how many of `count` coordinates a selection takes: at least one of a segment that has any."""
    if not 0 < density <= 1:
        raise ValueError(f"a density lies in (0, 1], got {density}")
    return min(count, ceil(count * density))


def select_largest(update: NDArray[np.float32], density: float) -> NDArray[np.bool_]:
    """Selects the coordinates of largest magnitude of one client's update: top-k. The update must be finite.

    Returns:
        bool, shape (count,), with exactly `selected_count(count, density)` set.
    """
    wanted = selected_count(update.size, density)
    if wanted == update.size:
        return np.ones(update.size, dtype=np.bool_)
    return _largest(np.abs(update), wanted)


def _largest(magnitudes: NDArray[np.float32], wanted: int) -> NDArray[np.bool_]:
    """Selects the `wanted` largest, at least 1. The threshold is a value, so the order of equals does not matter."""
    threshold = np.partition(magnitudes, magnitudes.size - wanted)[magnitudes.size - wanted]
    mask: NDArray[np.bool_] = magnitudes > threshold
    missing = wanted - int(np.count_nonzero(mask))
    mask[np.flatnonzero(magnitudes == threshold)[:missing]] = True
    return mask
