"""Norm clipping, the check of updates for NaN and infinity, and the clip, which adapts from round to round.

    c ← 1.25 · mean over survivors of min(‖x_i‖, 4c),   not below c/8

It follows from a sum that the server learns anyway, and reveals no single client's norm. Where a job counts steps, a
round takes it within b/64 ... b, where b is the norm that its steps can reach. So a client that lies about its norm can
neither open the clip for longer updates than honest ones, nor close it.

Rounding errors under masks are proportional to c, so a clip far too high costs more than a few clipped updates. The
usual rule, c ← c·exp(-0.2·(share within c - 0.8)) (Andrew et al., "Differentially private learning with adaptive
clipping", 2021), lowers the clip by at most 4% a round, but a federation has tens of rounds, not hundreds. The mean
norm shows in one round where the clip belongs, and the bound of 4c keeps a single honest client from moving it far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.errors import UpdateError

MIN_CLIP, MAX_CLIP = 1e-12, 1e12
MAX_NORM = 2.0**100  # no trained parameter comes near, and everything computed from it stays finite

_PIECE = 1 << 16  # values at a time: the float64 copy stays in the cache


def finite_norm(update: NDArray[np.float32]) -> float:
    """Computes ‖update‖₂ in float64, where squares of float32 values cannot overflow.

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
    """Returns the norm of an update that may be sent.

    Raises:
        UpdateError: the update is not a flat float32 vector, holds NaN or infinity, or is absurdly large.
    """
    norm = finite_norm(update)
    if norm > MAX_NORM:
        raise UpdateError(f"the update has norm {norm:.3g}, at most {MAX_NORM:.3g} can be sent")
    return norm


def clip_factor(norm: float, clip: float) -> float:
    """Returns min(1, clip/norm), the factor that scales a vector of this norm to a norm of at most `clip`."""
    return 1.0 if norm <= clip else clip / norm


HEADROOM = 1.25  # most updates are within the clip when norms vary by a quarter
NORM_BOUND = 4  # a norm counts as at most this many clips, so a clip grows at most fivefold in a round
MAX_SHRINK = 8  # one round of small updates must not cost many rounds of growth
LEAST_SHARE = 1 / 64  # of the largest norm; steps that all point elsewhere still reach its 1/√steps
STEP_SIZES: Mapping[str, float] = {"adamw": 1.0, "muon": 0.25}  # largest root mean square of a step, in learning rates


@dataclass(frozen=True)
class ClipRange:
    """The state of one segment: its clip c, a norm, in the units of the update."""

    clip: float

    def __post_init__(self) -> None:
        if not MIN_CLIP <= self.clip <= MAX_CLIP:
            raise ValueError(f"a clip lies in {MIN_CLIP} to {MAX_CLIP}, got {self.clip}")

    def adapt(self, mean_norm: float) -> ClipRange:
        """Returns the clip for this segment's next round.

        Args:
            mean_norm: mean norm of the survivors' selected updates, each counted as at most NORM_BOUND clips.
        """
        return ClipRange(min(max(HEADROOM * mean_norm, self.clip / MAX_SHRINK, MIN_CLIP), MAX_CLIP))


def largest_norm(optimizer: str, learning_rate: float, local_steps: int, count: int) -> float:
    """Returns b = s·η·steps·√count, which hardly any update exceeds; s is the optimizer's in STEP_SIZES.

    Adam moves a parameter by about the learning rate in a step. Muon's orthogonal steps have a root mean square of 0.2
    learning rates, and up to 0.24 since its singular values are only near 1.
    """
    return min(max(STEP_SIZES[optimizer] * learning_rate * local_steps * sqrt(count), MIN_CLIP), MAX_CLIP)
