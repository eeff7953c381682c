"""The selection of the coordinates that travel: a boolean mask over the segment, so that there are no indices to check.

Under masks all clients must send the same coordinates, so the selection is *public*, and the coordinates take turns.
To prefer coordinates that were large in the last aggregate works worse: their values have just left the residuals, and
local optimizers of Adam's kind move all coordinates by similar amounts anyway. On the demo, with error feedback and a
quarter sent each round, the sum of four rounds' aggregates was off by 21% (squared, relative; of B) when coordinates
took turns, by 42% when drawn at random and by 65% when four fifths followed the last aggregate
(benchmarks/compression/selection.md).

In the clear each client sends its own largest coordinates, and the entropy coder encodes their positions.

Both selections are exact functions of their arguments: among equal magnitudes the lower position wins, on every
machine.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from fedtune.core.seeds import draw_uint32, open_stream

_CIRCLE = 1 << 32


def select_public(count: int, density: float, seed: int, selection_phase: int) -> NDArray[np.bool_]:
    """Selects the coordinates that all clients send in a selection phase.

    Every coordinate has a random place on a circle, and a window of width `density` moves on by its own width each
    phase. So phases share no coordinate until the circle is full, and no coordinate waits longer than 1/density phases,
    rounded up.

    Args:
        count: number of coordinates. Where devices train different parts of a factor, select over the whole factor and
            restrict the mask to each part, so that all clients agree.
        density: share of coordinates to send, in (0, 1].
        seed: public seed, the same in every phase.
        selection_phase: number of earlier selections from these coordinates; any whole number.

    Returns:
        bool, shape (count,); on average the share `density` of it is set.
    """
    _check_density(density)
    if density == 1:
        return np.ones(count, dtype=np.bool_)
    width = ceil(density * _CIRCLE)
    places = draw_uint32(open_stream(seed, "selection"), count)
    mask: NDArray[np.bool_] = places - np.uint32(selection_phase * width % _CIRCLE) < width
    return mask


def selected_count(count: int, density: float) -> int:
    """Returns how many of `count` coordinates a private selection takes: at least one of a segment that has any."""
    _check_density(density)
    return min(count, ceil(count * density))


def select_largest(update: NDArray[np.float32], density: float) -> NDArray[np.bool_]:
    """Selects the coordinates of largest magnitude of one client's update: private top-k. The update must be finite.

    Returns:
        bool, shape (count,), with exactly `selected_count(count, density)` set.
    """
    wanted = selected_count(update.size, density)
    if wanted == update.size:
        return np.ones(update.size, dtype=np.bool_)
    return _largest(np.abs(update), wanted)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"a density lies in (0, 1], got {density}")


def _largest(magnitudes: NDArray[np.float32], wanted: int) -> NDArray[np.bool_]:
    """Selects the `wanted` largest, at least 1. The threshold is a value, so the order of equals does not matter."""
    threshold = np.partition(magnitudes, magnitudes.size - wanted)[magnitudes.size - wanted]
    mask: NDArray[np.bool_] = magnitudes > threshold
    missing = wanted - int(np.count_nonzero(mask))
    mask[np.flatnonzero(magnitudes == threshold)[:missing]] = True
    return mask
