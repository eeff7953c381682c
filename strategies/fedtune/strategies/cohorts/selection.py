"""The selection of a round's cohort: the clients that are asked to train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedtune.core.round_records import ClientRecord
from fedtune.core.seeds import generator


class Selection(Protocol):
    """A policy for choosing the cohort."""

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns the names of this round's clients, in a fixed order, out of those that can be reached now."""

    @property
    def wanted(self) -> int | float:
        """The wanted number of clients: a count, or a share of the population. The cohort may be larger."""

    def deadline(self, population: Sequence[str]) -> float | None:
        """Returns the seconds that a round with clients of this population may take; None to wait for all."""

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> Selection:
        """Returns the selection after a round, updated by its clients' records."""


def cohort_size(wanted: int | float, population: int) -> int:
    """Returns the number of clients that a round asks: a count or a share of the population, at most all of it."""
    count = max(1, round(wanted * population)) if isinstance(wanted, float) else wanted
    return min(count, population)


@dataclass(frozen=True)
class UniformSelection:
    """Samples uniformly without replacement; the same seed, round and population give the same cohort.

    Args:
        wanted: a count, or a share of the population.
        seed: the job's.
    """

    wanted: int | float
    seed: int

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns min(wanted, population) names in sorted order."""
        names = sorted(population)
        count = cohort_size(self.wanted, len(names))
        if count == len(names):
            return names
        chosen = generator(self.seed, "cohort", round_number).choice(len(names), size=count, replace=False)
        return [names[index] for index in sorted(chosen)]

    def deadline(self, population: Sequence[str]) -> None:
        """Returns None: the round waits for all clients."""
        del population

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> UniformSelection:
        """Returns the same selection; the records are not used."""
        del round_number, clients
        return self


@dataclass(frozen=True)
class AmongPresent:
    """Restricts another selection to the clients that are available in a round.

    Args:
        present: (round number, names) -> the available ones among them.
    """

    inner: Selection
    present: Callable[[int, Sequence[str]], Sequence[str]]

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns the inner selection's cohort of the available clients."""
        return self.inner.cohort(round_number, self.present(round_number, sorted(population)))

    @property
    def wanted(self) -> int | float:
        """The inner selection's number."""
        return self.inner.wanted

    def deadline(self, population: Sequence[str]) -> float | None:
        """Returns the inner selection's deadline."""
        return self.inner.deadline(population)

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> Selection:
        """Returns the selection with the updated inner one."""
        return replace(self, inner=self.inner.learned(round_number, clients))


@dataclass(frozen=True)
class Rationed:
    """Restricts a uniform selection to clients that may still take part, those who did so least often first.

    Args:
        most: rounds in which a client takes part at most.
        taken: client -> rounds for which it was asked so far, whether its update came or not.
    """

    inner: UniformSelection
    most: int
    taken: Mapping[str, int] = field(default_factory=dict)

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns as many clients as are wanted of the whole population, among those with the fewest rounds."""
        left = sorted(rounds for name in population if (rounds := self.taken.get(name, 0)) < self.most)
        needed = min(cohort_size(self.wanted, len(population)), len(left))
        if not needed:
            return []
        able = [name for name in population if self.taken.get(name, 0) <= left[needed - 1]]
        return replace(self.inner, wanted=needed).cohort(round_number, able)

    @property
    def wanted(self) -> int | float:
        """The inner selection's number."""
        return self.inner.wanted

    def deadline(self, population: Sequence[str]) -> None:
        """Returns None: the round waits for all clients."""
        del population

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> Selection:
        """Returns the selection with these clients' rounds counted, and the updated inner one."""
        taken = Counter(self.taken)
        taken.update(client.id for client in clients)
        return replace(self, inner=self.inner.learned(round_number, clients), taken=taken)
