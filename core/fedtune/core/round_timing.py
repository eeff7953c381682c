"""The time of a round: its deadline, the share of the work that a slow client does by then, and its course on a virtual
clock, where a straggler costs no real time.

    deadline = round_deadline(predicted.values())
    share = done_share(predicted[name], deadline)
    course = run_clock(arrivals, wanted=10, deadline=deadline)

Pure functions of seconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Course:
    """How a round went.

    Args:
        arrived: names in order of arrival, those that count.
        late: names that had not arrived when the round closed, those that vanished included.
        seconds: until it closed.
    """

    arrived: tuple[str, ...]
    late: tuple[str, ...]
    seconds: float


def run_clock(arrivals: Mapping[str, float | None], wanted: int, deadline: float | None, least: int = 0) -> Course:
    """Closes the round when `wanted` clients have arrived, at the deadline, or when nobody else can come.

    Args:
        arrivals: name -> seconds, None for a client that vanished. Without a deadline a vanished one is noticed when
            the last of the others has arrived.
        least: with fewer the round would come to nothing, so it waits for them beyond the deadline.
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
    """What a late update weighs in the clear: 1/√(1 + τ) for τ rounds (Xie et al. 2019, polynomial, a = ½)."""
    if rounds_late < 0:
        raise ValueError(f"an update from {-rounds_late} rounds ahead")
    return 1.0 / math.sqrt(1.0 + rounds_late)
