"""Norm clipping, the one look at an update for NaN and infinity, and what adapts from round to round: the clip, and the
weight that counts as one in a ring's words.

Both follow from sums that are made anyway; nobody's own norm or weight is shown.

    c   ← 1.25 · mean over survivors of min(‖x_i‖, 4c),   and not below c/8
    cap ← 1.25 · mean over survivors of min(n_i, cap),     at most the job's cap

**The clip.** Rounding errors under masks are in proportion to c, so a clip far too high costs more than a few clipped
updates, whose rest stays in the residual. The usual rule, c ← c·exp(-0.2·(share within c - 0.8)) (Andrew et al.,
"Differentially private learning with adaptive clipping", 2021), comes down by 4% a round, and a federation has tens
of rounds, not hundreds. The mean norm says in one round where the clip belongs, and the bound of 4c keeps one client
from moving it far.

**The cap.** A ring's words have room for a client of weight one, and rounding errors are in proportion to that room,
not to the weights that are there: where everybody weighs a sixth of the cap, four bits are worth little more than one,
and error feedback, which takes a client's own rounding errors in, does not settle at all. So the cap stays near the
mean. It starts low, where all weigh the same, and rises by a quarter a round for as long as all reach it. Clients of
similar size then weigh what they have; one that has many times more than the rest counts as little more than the rest.
The sum of weights is the one that the mean update is divided by. Under caps that differ from round to round, these
sums say a little more about a cohort, namely how unequal it is.
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


HEADROOM = 1.25  # most updates are within the clip when norms vary by a quarter
NORM_BOUND = 4  # a norm counts as at most this many clips, so a clip grows at most fivefold in a round
MAX_SHRINK = 8  # one round of small updates must not cost many rounds of growth
FIRST_WEIGHT_CAP = {"examples": 32.0, "tokens": 1024.0, "uniform": 1.0}  # by what a client's weight is
LEAST_WEIGHT_CAP = 4.0  # so that a cap rises again, by whole numbers, after a round of clients with next to nothing


@dataclass(frozen=True)
class ClipRange:
    """The state of one segment: its clip c, a norm, in the units of the update."""

    clip: float

    def __post_init__(self) -> None:
        if not MIN_CLIP <= self.clip <= MAX_NORM:
            raise ValueError(f"a clip lies in {MIN_CLIP} to {MAX_NORM:.3g}, got {self.clip}")

    def adapt(self, mean_norm: float) -> ClipRange:
        """The clip for this segment's next round.

        Args:
            mean_norm: of the survivors' selected updates, each counted as at most NORM_BOUND clips.
        """
        return ClipRange(min(max(HEADROOM * mean_norm, self.clip / MAX_SHRINK, MIN_CLIP), MAX_NORM))


def initial_clip(learning_rate: float, local_steps: int, count: int) -> ClipRange:
    """learning_rate·local_steps·√count: a start that follows from the job alone.

    Adam moves a parameter by about the learning rate in a step, so hardly any update is longer.
    """
    return ClipRange(max(learning_rate * local_steps * sqrt(count), MIN_CLIP))


def next_weight_cap(mean_weight: float) -> float:
    """The cap of the next round.

    Args:
        mean_weight: of the survivors, each counted as at most this round's cap; in examples or tokens.
    """
    return max(HEADROOM * mean_weight, LEAST_WEIGHT_CAP)
