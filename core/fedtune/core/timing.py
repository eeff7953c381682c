"""How long a round may take, and how much of its work a slow client does by then.

deadline = round_deadline(predicted.values())
share = done_share(predicted[name], deadline)
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

QUANTILE, MARGIN = 0.8, 1.3
OVER_SELECTION = 1.3
LEAST_WORK = 0.2  # of a round's local work, whatever the deadline: a server may not make all but one device idle
_SAFETY = 0.9  # of the deadline that a slow client's work is planned for


def round_deadline(predicted: Collection[float]) -> float:
    """1.3 times the 80th percentile of the predicted seconds of those that could be asked.

    Raises:
        ValueError: nobody, or a time that is not positive and finite.
    """
    seconds = np.array(list(predicted), dtype=np.float64)
    if not seconds.size or not np.isfinite(seconds).all() or seconds.min() <= 0:
        raise ValueError("a deadline needs at least one predicted time, all positive and finite")
    return MARGIN * float(np.quantile(seconds, QUANTILE))


def work_share(predicted: float, deadline: float) -> float:
    """The share of a round's local work that a client can do by the deadline: 1, less for the slow, 0 for the hopeless.

    Whole tiers are slower than any deadline that is right for the others; with less work a round they still contribute.
    """
    if predicted <= deadline:
        return 1.0
    share = _SAFETY * deadline / predicted
    return share if share >= LEAST_WORK else 0.0


def done_share(predicted: float, deadline: float | None) -> float:
    """The share of a round's local work that a client does once it is asked: all of it where there is no deadline, and
    never less than LEAST_WORK, in time or not."""
    return 1.0 if deadline is None else work_share(predicted, deadline) or LEAST_WORK


def over_selected(wanted: int, available: int) -> int:
    """How many are asked so that about `wanted` arrive in time."""
    return min(available, math.ceil(wanted * OVER_SELECTION))
