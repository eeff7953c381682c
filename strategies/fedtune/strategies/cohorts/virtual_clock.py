"""A round on a virtual clock: who is in time, and how long the round lasts.

    course = run_clock(arrivals, wanted=10, deadline=deadline)

Pure functions of seconds: a straggler costs virtual time and no real time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


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
