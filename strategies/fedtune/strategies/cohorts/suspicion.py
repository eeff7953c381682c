"""Suspicion: narrows down which device makes sums fail, when nobody can be named, by how the next cohorts are cut.

    suspicion = suspicion.after(outcomes)           # of a round's groups
    suspicion.suspects                              # split over the groups of the next round
    suspicion.excluded                              # left out of every later cohort

A circle is a set of clients at least one of which made a sum fail. A client whose update is in a later sum is cleared;
of a group that fails again, its suspects alone stay. With the suspects dealt evenly over groups, a device that makes
every one of its sums fail is the last of its circle after log2(n) more rounds, and if its next sum fails too, it is
excluded. In that last round it has a group without its companions of the round before, as far as clients are there, so
that a second hostile device among them cannot put its own failure on an innocent one.

A failure by too few answers makes no suspects: the silent ones are known by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GroupOutcome:
    """The outcome of one group's sum.

    Args:
        members: the group's clients.
        summed: clients whose update is in the sum; none where there is no sum.
        reason: why there is no sum; None where there is one.
        suspects: clients of which at least one made the sum fail; none where it failed by named ones.
    """

    members: tuple[str, ...]
    summed: frozenset[str] = NOBODY
    reason: str | None = None
    suspects: frozenset[str] = NOBODY


@dataclass(frozen=True)
class Circle:
    """Clients of which at least one made a sum fail.

    Args:
        suspects: at least one.
        companions: the other clients of the group that failed last, which had been cleared, or never suspected.
    """

    suspects: frozenset[str]
    companions: frozenset[str] = NOBODY


@dataclass(frozen=True)
class Suspicion:
    """The circles so far, which have no client in common, and the clients that were found.

    Args:
        excluded: in the order in which they were found.
    """

    circles: tuple[Circle, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def suspects(self) -> frozenset[str]:
        """The clients of all circles."""
        return NOBODY.union(*(circle.suspects for circle in self.circles))

    def after(self, outcomes: Sequence[GroupOutcome]) -> Suspicion:
        """Returns the suspicion after a round with these outcomes."""
        cleared = NOBODY.union(*(outcome.summed for outcome in outcomes))
        failed = NOBODY.union(*(outcome.suspects for outcome in outcomes))
        circles, excluded = [], list(self.excluded)
        alone = {circle.suspects for circle in self.circles if len(circle.suspects) == 1}
        for outcome in outcomes:
            if not outcome.suspects:
                continue
            narrowed = outcome.suspects & self.suspects or outcome.suspects
            if narrowed in alone:
                excluded += narrowed
            else:
                circles.append(Circle(narrowed, outcome.suspects - narrowed))
        for circle in self.circles:
            left = circle.suspects - cleared
            if left and not left & failed:  # otherwise a circle of this round has its place
                circles.append(Circle(left, circle.companions))
        return Suspicion(tuple(circles), tuple(excluded))

    def notes(self, before: Suspicion) -> tuple[str, ...]:
        """Returns one sentence about each circle and each exclusion that `before` did not have."""
        found = [name for name in self.excluded if name not in before.excluded]
        why = "all its sums failed, and every other suspect had one that did not"
        notes = [f"{name} is left out from now on: {why}" for name in found]
        for circle in self.circles:
            if circle not in before.circles:
                names = sorted(circle.suspects)
                notes.append(f"suspects of a failed sum, {len(names)}: {', '.join(names)}")
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Returns the object in a checkpoint."""
        circles = [
            {"suspects": sorted(circle.suspects), "companions": sorted(circle.companions)} for circle in self.circles
        ]
        return {"circles": circles, "excluded": list(self.excluded)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Suspicion:
        """Reads the object that `to_json` wrote."""
        circles = (
            Circle(frozenset(circle["suspects"]), frozenset(circle["companions"])) for circle in values["circles"]
        )
        return cls(tuple(circles), tuple(values["excluded"]))


UNSUSPECTED = Suspicion()
