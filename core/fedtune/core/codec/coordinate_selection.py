"""Which coordinates travel. A selection is a boolean mask over the segment: one order, and no indices to check.

Under masks all clients must send the same coordinates, so the selection is *public*, and the coordinates simply take
turns. To prefer those that were large in the last aggregate is worse than it looks: what was just sent is what has
just left the residuals, and local optimizers of Adam's kind move all coordinates by similar amounts anyway. On the
demo, with error feedback and a quarter sent each time, the sum of four rounds' aggregates was off by 21% (squared,
relative; of B) when coordinates took turns, by 42% when drawn at random and by 65% when four fifths followed the last
aggregate (benchmarks/compression/selection.md).

In the clear each client sends its own largest coordinates, and the entropy coder pays for saying which.

Both are exact functions of their arguments: where magnitudes are equal the lower position wins, on every machine.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from fedtune.core.seeds import draw_uint32, open_stream

_CIRCLE = 1 << 32


def select_public(count: int, density: float, seed: int, selection_phase: int) -> NDArray[np.bool_]:
    """The coordinates whose turn it is.

    Every coordinate has a random place on a circle, and a window of width `density` moves on by its own width each
    turn. So turns share nothing until the circle is full, and no coordinate waits longer than 1/density turns,
    rounded up.

    Args:
        count: coordinates to choose from. Where devices train different parts of a factor, choose over the whole
            factor and restrict the mask to each part, so that everybody's turns agree.
        density: the share of coordinates to send, in (0, 1].
        seed: public, and the same in every turn.
        turn: how often these coordinates were chosen from before; any whole number.

    Returns:
        bool, shape (count,); on average `density` of it is set.
    """
    _check_density(density)
    if density == 1:
        return np.ones(count, dtype=np.bool_)
    width = ceil(density * _CIRCLE)
    places = draw_uint32(open_stream(seed, "selection"), count)
    mask: NDArray[np.bool_] = places - np.uint32(selection_phase * width % _CIRCLE) < width
    return mask


def selected_count(count: int, density: float) -> int:
    """How many of `count` coordinates a private selection takes: at least one of a segment that has any."""
    _check_density(density)
    return min(count, ceil(count * density))


def select_largest(update: NDArray[np.float32], density: float) -> NDArray[np.bool_]:
    """The coordinates of largest magnitude of one client's update: private top-k. The update must be finite.

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
    """Mask of the `wanted` largest, at least 1; a threshold is a value, whatever a sort does with equals."""
    threshold = np.partition(magnitudes, magnitudes.size - wanted)[magnitudes.size - wanted]
    mask: NDArray[np.bool_] = magnitudes > threshold
    missing = wanted - int(np.count_nonzero(mask))
    mask[np.flatnonzero(magnitudes == threshold)[:missing]] = True
    return mask
