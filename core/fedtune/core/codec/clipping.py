"""Norm clipping, the check of updates for NaN and infinity, and the two values that adapt from round to round.

These are the clip, and the weight cap: the weight that counts as one in a ring's words. Both follow from sums that the
server learns anyway; they reveal no single client's norm or weight.

    c   ← 1.25 · mean over survivors of min(‖x_i‖, 4c),   and not below c/8
    cap ← 1.25 · mean over survivors of min(n_i, cap),     at most the job's cap

**The clip.** Rounding errors under masks are proportional to c, so a clip far too high costs more than a few clipped
updates, whose rest stays in the residual. The usual rule, c ← c·exp(-0.2·(share within c - 0.8)) (Andrew et al.,
"Differentially private learning with adaptive clipping", 2021), lowers the clip by at most 4% a round, but a federation
has tens of rounds, not hundreds. The mean norm shows in one round where the clip belongs, and the bound of 4c keeps a
single client from moving it far.

**The cap.** A ring's words have room for a client of weight one, and rounding errors are proportional to that room, not
to the actual weights. Where every client's weight is a sixth of the cap, four bits are worth little more than one, and
error feedback, which includes a client's own rounding errors, does not converge. So the cap stays near the mean weight.
It starts low, where all clients have the same weight, and rises by a quarter a round as long as all clients reach it.
Clients of similar size then get their true weights; a client with many times more examples than the others counts for
little more than they do. The sum of weights is the divisor of the mean update. As caps differ from round to round,
these sums reveal slightly more about a cohort: how unequal its clients are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.errors import UpdateError

MIN_CLIP = 1e-12
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
FIRST_WEIGHT_CAP = {"examples": 32.0, "tokens": 1024.0, "uniform": 1.0}  # by `federation.weight`
LEAST_WEIGHT_CAP = 4.0  # so that a cap rises again, by whole numbers, after a round of clients with very few examples


@dataclass(frozen=True)
class ClipRange:
    """The state of one segment: its clip c, a norm, in the units of the update."""

    clip: float

    def __post_init__(self) -> None:
        if not MIN_CLIP <= self.clip <= MAX_NORM:
            raise ValueError(f"a clip lies in {MIN_CLIP} to {MAX_NORM:.3g}, got {self.clip}")

    def adapt(self, mean_norm: float) -> ClipRange:
        """Returns the clip for this segment's next round.

        Args:
            mean_norm: mean norm of the survivors' selected updates, each counted as at most NORM_BOUND clips.
        """
        return ClipRange(min(max(HEADROOM * mean_norm, self.clip / MAX_SHRINK, MIN_CLIP), MAX_NORM))


def initial_clip(learning_rate: float, local_steps: int, count: int) -> ClipRange:
    """Returns learning_rate·local_steps·√count as the first clip, which follows from the job alone.

    Adam moves a parameter by about the learning rate in a step, so hardly any update has a larger norm.
    """
    return ClipRange(max(learning_rate * local_steps * sqrt(count), MIN_CLIP))


def next_weight_cap(mean_weight: float) -> float:
    """Returns the weight cap of the next round.

    Args:
        mean_weight: mean weight of the survivors, each counted as at most this round's cap; in examples or tokens.
    """
    return max(HEADROOM * mean_weight, LEAST_WEIGHT_CAP)
