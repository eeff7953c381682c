"""The schedule of a round: when it goes on without the clients that have not answered.

A schedule is a policy and does no waiting itself: it hands out a `Closing`, which whoever drives the round keeps to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.core.job.settings import Job
from fedtune.core.secagg.graph import part
from fedtune.strategies.cohorts.selection import Selection, cohort_size


@dataclass(frozen=True)
class Closing:
    """The end of an exchange for those who have not answered.

    Args:
        seconds: after so many.
        enough: after so many answers.
        least: with fewer answers it waits on, whatever the time.
    """

    seconds: float
    enough: int
    least: int


class Schedule(Protocol):
    """A way to end the training of a round."""

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> Closing | None:
        """The end of this round's training; None where everybody is waited for, as long as the job's deadline allows.

        Args:
            selection: knows what clients are predicted to take.
            population: names of the clients that can be reached now.
            cohort: how many are asked to train.
        """


@dataclass(frozen=True)
class Synchronous:
    """Everybody is waited for."""

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> None:
        """None."""
        del selection, population, cohort


@dataclass(frozen=True)
class ByDeadline:
    """A round that has the answers it wanted goes on, and so does one past the deadline of its selection.

    The deadline is missed by so many that the sum could not be opened, or by half of those wanted? Then it was wrong,
    and the round waits on.
    """

    job: Job

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> Closing | None:
        """By the selection's deadline for this population; None in a round that has none yet."""
        deadline = selection.deadline(population)
        if deadline is None:
            return None
        secure, wanted = self.job.secure_aggregation, cohort_size(selection.wanted, len(population))
        least = cohort - part(secure.max_dropout, cohort) if secure.enabled else math.ceil(wanted / 2)
        least = min(max(least, self.job.federation.minimum_clients), cohort)
        return Closing(deadline, max(wanted, least), least)
