"""Norm clipping, and the one place where an update is looked at for NaN and infinity."""

from __future__ import annotations

from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.errors import UpdateError

MIN_CLIP = 1e-12
MAX_NORM = 2.0**100  # no trained parameter comes near, and everything computed from it stays finite

_PIECE = 1 << 16  # values at a time: the float64 copy stays in the cache


def finite_norm(update: NDArray[np.float32]) -> float:
    """‖update‖₂, accumulated in float64, where squares of float32 values cannot overflow.

    Raises:
        UpdateError: the update is not a flat float32 vector, or holds NaN or infinity.
    """
    if update.ndim != 1 or update.dtype != np.float32:
        raise UpdateError(f"an update is a flat float32 vector, got {update.dtype} of shape {update.shape}")
    total = 0.0
    for start in range(0, update.size, _PIECE):
        total += float(np.square(update[start : start + _PIECE], dtype=np.float64).sum())
    if not isfinite(total):
        bad = np.flatnonzero(~np.isfinite(update))
        raise UpdateError(
            f"{bad.size} of the update's {update.size} values are NaN or infinite, the first at position {bad[0]}"
        )
    return sqrt(total)


def check_update(update: NDArray[np.float32]) -> float:
    """The norm of an update that may be sent.

    Raises:
        UpdateError: the update is not a flat float32 vector, holds NaN or infinity, or is absurdly large.
    """
    norm = finite_norm(update)
    if norm > MAX_NORM:
        raise UpdateError(f"the update has norm {norm:.3g}, at most {MAX_NORM:.3g} can be sent")
    return norm


def clip_factor(norm: float, clip: float) -> float:
    """min(1, clip/norm): what a vector of this norm is multiplied with so that its norm is at most `clip`."""
    return 1.0 if norm <= clip else clip / norm
