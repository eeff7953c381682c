"""The weight that counts as one in a ring, adapted from round to round by the securely summed weights.

    cap ← 1.25 · mean over survivors of min(n_i, cap),   at most the job's cap

A ring's words have room for a client of weight one, and rounding errors are in proportion to that room, not to the
weights that are there: where everybody weighs a sixth of the cap, four bits are worth little more than one, and error
feedback, which takes a client's own rounding errors in, does not settle at all. So the cap stays near the mean. It
starts low, where all weigh the same, and rises by a quarter a round for as long as all reach it. Clients of similar
size then weigh what they have; one that has many times more than the rest counts as little more than the rest.

All it takes is the sum that the mean update is divided by anyway. Under caps that differ from round to round, these
sums say a little more about a cohort, namely how unequal it is.
"""

from __future__ import annotations

HEADROOM = 1.25
FIRST = {"examples": 32.0, "tokens": 1024.0, "uniform": 1.0}  # by what a client's weight is
LEAST = 4.0  # so that a cap comes up again, by whole numbers, after a round of clients that have next to nothing


def next_weight_cap(mean_weight: float) -> float:
    """The cap of the next round.

    Args:
        mean_weight: of the survivors, each counted as at most this round's cap; in examples or tokens.
    """
    return max(HEADROOM * mean_weight, LEAST)
