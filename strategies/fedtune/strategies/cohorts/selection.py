"""The selection of a round's cohort: the clients that are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedtune.core.round_records import ClientRecord
from fedtune.core.seeds import generator


class Selection(Protocol):
    """A way to choose the cohort."""

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """The names of the clients of this round, in a fixed order, out of those that can be reached now."""

    @property
    def wanted(self) -> int | float:
        """How many clients shall take part: a count, or a share of the population. The cohort may be larger."""

    def deadline(self, population: Sequence[str]) -> float | None:
        """Seconds in which a round with clients of this population should be done; None where all are waited for."""

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> Selection:
        """The selection after a round, which may have taught something about the clients in it."""


def cohort_size(wanted: int | float, population: int) -> int:
    """How many clients a round asks: a count, or a share of the population, but never more than there are."""
    count = max(1, round(wanted * population)) if isinstance(wanted, float) else wanted
    return min(count, population)


@dataclass(frozen=True)
class UniformSelection:
    """Without replacement, every client alike; the same seed, round and population give the same cohort.

    Args:
        wanted: a count, or a share of the population.
        seed: the job's.
    """

    wanted: int | float
    seed: int

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """min(wanted, population) names in the population's order of names."""
        names = sorted(population)
        count = cohort_size(self.wanted, len(names))
        if count == len(names):
            return names
        chosen = generator(self.seed, "cohort", round_number).choice(len(names), size=count, replace=False)
        return [names[index] for index in sorted(chosen)]

    def deadline(self, population: Sequence[str]) -> None:
        """None: everybody is waited for."""
        del population

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> UniformSelection:
        """The same; nothing is looked at."""
        del round_number, clients
        return self


@dataclass(frozen=True)
class AmongPresent:
    """Another selection, among the clients that can be asked in a round.

    Args:
        present: (round number, names) -> those of them that can be asked.
    """

    inner: Selection
    present: Callable[[int, Sequence[str]], Sequence[str]]

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """The inner selection's cohort of those."""
        return self.inner.cohort(round_number, self.present(round_number, sorted(population)))

    @property
    def wanted(self) -> int | float:
        """As the inner selection wants it."""
        return self.inner.wanted

    def deadline(self, population: Sequence[str]) -> float | None:
        """The inner selection's."""
        return self.inner.deadline(population)

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> Selection:
        """With what the inner selection has learned."""
        return replace(self, inner=self.inner.learned(round_number, clients))
