"""What a ring's words can hold, adapted from round to round: the clip range, and the weight that counts as one.

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
from math import sqrt

from fedtune.core.codec.clipping import MAX_NORM, MIN_CLIP

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
