"""The schedule of a round: the policy that decides when it goes on without the clients that have not answered.

A schedule does not wait itself: it returns a `Closing`, and the driver of the round waits by it.
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
    """The condition that closes an exchange for clients that have not answered.

    Args:
        seconds: time after which it closes.
        enough: number of answers at which it closes.
        least: number of answers below which it stays open, whatever the time.
    """

    seconds: float
    enough: int
    least: int


class Schedule(Protocol):
    """A policy for closing the training of a round."""

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> Closing | None:
        """Returns the closing of this round's training; None to wait for all clients up to the job's deadline.

        Args:
            selection: selection with the predicted times of clients.
            population: names of the clients that can be reached now.
            cohort: number of clients that are asked to train.
        """


@dataclass(frozen=True)
class Synchronous:
    """Waits for all clients."""

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> None:
        """Returns None: the round waits for all clients."""
        del selection, population, cohort


@dataclass(frozen=True)
class ByDeadline:
    """Closes a round once it has the wanted answers, or at the deadline of its selection.

    A deadline that is missed by half of the wanted clients, or by so many that the sum could not be opened, was wrong;
    the round then waits on.
    """

    job: Job

    def closing(self, selection: Selection, population: Sequence[str], cohort: int) -> Closing | None:
        """Returns the closing by the selection's deadline for this population; None in a round without a deadline."""
        deadline = selection.deadline(population)
        if deadline is None:
            return None
        secure, wanted = self.job.secure_aggregation, cohort_size(selection.wanted, len(population))
        least = cohort - part(secure.max_dropout, cohort) if secure.enabled else math.ceil(wanted / 2)
        least = min(max(least, self.job.federation.minimum_clients), cohort)
        return Closing(deadline, max(wanted, least), least)
