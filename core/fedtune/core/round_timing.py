"""The timing of a round: its deadline, the share of the work that a slow client does by then, and its virtual clock.

    deadline = round_deadline(predicted.values())
    share = done_share(predicted[name], deadline)
    course = run_clock(arrivals, wanted=10, deadline=deadline)

All of these are pure functions of seconds, so stragglers cost no real time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

QUANTILE, MARGIN = 0.8, 1.3
OVER_SELECTION = 1.3
LEAST_WORK = 0.2  # share of a round's local work, for any deadline: a server may not make all but one device idle
_SAFETY = 0.9  # share of the deadline for which a slow client's work is planned


def round_deadline(predicted: Collection[float]) -> float:
    """Returns 1.3 times the 80th percentile of the predicted seconds of all clients that could be asked.

    Raises:
        ValueError: there is no client, or a time is not positive and finite.
    """
    seconds = np.array(list(predicted), dtype=np.float64)
    if not seconds.size or not np.isfinite(seconds).all() or seconds.min() <= 0:
        raise ValueError("a deadline needs at least one predicted time, all positive and finite")
    return MARGIN * float(np.quantile(seconds, QUANTILE))


def work_share(predicted: float, deadline: float) -> float:
    """Returns the share of a round's local work that a client can do by the deadline; 0 where that is too little.

    Whole tiers can be slower than any deadline that suits the others; with less work a round they still contribute.
    """
    if predicted <= deadline:
        return 1.0
    share = _SAFETY * deadline / predicted
    return share if share >= LEAST_WORK else 0.0


def done_share(predicted: float, deadline: float | None) -> float:
    """Returns the share of a round's local work that a client does once it is asked.

    It is 1 where there is no deadline, and never less than LEAST_WORK, in time or not.
    """
    return 1.0 if deadline is None else work_share(predicted, deadline) or LEAST_WORK


def over_selected(wanted: int, available: int) -> int:
    """Returns how many clients to ask so that about `wanted` answer in time."""
    return min(available, math.ceil(wanted * OVER_SELECTION))


@dataclass(frozen=True)
class Course:
    """The course of a round.

    Args:
        arrived: names of the clients that answered before the round closed, in order of arrival.
        late: names of the others, including clients that vanished.
        seconds: time until the round closed.
    """

    arrived: tuple[str, ...]
    late: tuple[str, ...]
    seconds: float


def run_clock(arrivals: Mapping[str, float | None], wanted: int, deadline: float | None, least: int = 0) -> Course:
    """Closes the round when `wanted` clients have answered, at the deadline, or when no other client can answer.

    Args:
        arrivals: name -> seconds, None for a client that vanished. Without a deadline a vanished client is noticed when
            the last of the others has answered.
        least: fewest answers with which the round has a result; it waits for them beyond the deadline.
    """
    order = sorted((seconds, name) for name, seconds in arrivals.items() if seconds is not None)
    wanted = max(wanted, least)
    if deadline is not None and least and len(order) >= least:
        deadline = max(deadline, order[least - 1][0])
    counted = [(seconds, name) for seconds, name in order if deadline is None or seconds <= deadline][:wanted]
    complete = len(counted) == min(wanted, len(arrivals))
    seconds = (counted[-1][0] if counted else 0.0) if complete or deadline is None else deadline
    arrived = tuple(name for _, name in counted)
    return Course(arrived, tuple(sorted(set(arrivals) - set(arrived))), seconds)


def staleness_weight(rounds_late: int) -> float:
    """Returns a stale update's weight in the clear: 1/√(1 + τ) for τ rounds (Xie et al. 2019, polynomial, a = ½)."""
    if rounds_late < 0:
        raise ValueError(f"an update from {-rounds_late} rounds ahead")
    return 1.0 / math.sqrt(1.0 + rounds_late)
