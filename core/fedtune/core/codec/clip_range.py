"""The clip range, adapted from round to round by one securely summed number, the mean norm of the updates.

    c ← 1.25 · mean over survivors of min(‖x_i‖, 4c),   and not below c/8

Rounding errors under masks are in proportion to c, so a clip far too high costs more than a few clipped updates,
whose rest stays in the residual. The usual rule, c ← c·exp(-0.2·(share within c - 0.8)) (Andrew et al.,
"Differentially private learning with adaptive clipping", 2021), comes down by 4% a round, and a federation has tens
of rounds, not hundreds. The mean norm says in one round where the clip belongs. It is a sum like the weights', and
nobody's own norm is shown; the bound of 4c keeps one client from moving it far.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from fedtune.core.codec.clipping import MAX_NORM, MIN_CLIP

HEADROOM = 1.25  # most updates are within the clip when norms vary by a quarter
NORM_BOUND = 4  # a norm counts as at most this many clips, so a clip grows at most fivefold in a round
MAX_SHRINK = 8  # one round of small updates must not cost many rounds of growth


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
