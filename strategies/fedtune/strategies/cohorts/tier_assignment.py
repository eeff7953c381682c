"""The tier that every client of a cohort trains in a round: its own, a smaller one where too few have it, or none.

    assignment = assign_tiers(cohort, ranks, job)           # or all_alike(cohort, layout.rank)
    assignment.trained["phone-7"]                      # rank indices; 0 sits out

In the clear every client trains its own tier. Under secure aggregation a client hides among those of its tier, so each
tier needs a minimum of clients. The clients of a smaller one train a lower tier; the adapter's public permutation still
brings every rank index to all clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedtune.core.adapter.tiers import merged_tiers, tier_for
from fedtune.core.job.secure_cohorts import tier_least
from fedtune.core.job.settings import Job

Ranks = Callable[[str], int]
"""Client name -> number of rank indices it can train; numbers above the adapter's rank count as its rank."""


@dataclass(frozen=True)
class TierAssignment:
    """The tiers of one round.

    Args:
        own: client -> the highest tier it can train; 0 where it can train none of the job's.
        trained: client -> the tier it trains; 0 where it sits out.
        notes: one sentence about each tier that was merged or sat out.
    """

    own: Mapping[str, int]
    trained: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def tiers(self) -> tuple[int, ...]:
        """The tiers that are trained, ascending."""
        return tuple(sorted(set(self.trained.values()) - {0}))


def assign_tiers(cohort: Sequence[str], ranks: Ranks, job: Job) -> TierAssignment:
    """Assigns a tier to every client of a cohort."""
    own = {name: tier_for(ranks(name), job.tiers) for name in cohort}
    counts = Counter(tier for tier in own.values() if tier)
    secure = job.secure_aggregation
    least = tier_least(secure, len(cohort)) if secure.enabled else 1
    moved = {0: 0, **merged_tiers(counts, least)}
    notes = [
        f"tier {tier}: {counts[tier]} of at least {least} clients; "
        + (f"trained as tier {moved[tier]}" if moved[tier] else "sat out")
        for tier in sorted(counts)
        if moved[tier] != tier
    ]
    if unable := sum(tier == 0 for tier in own.values()):
        notes.append(f"clients that cannot train the smallest tier, {job.tiers[0]}: {unable}; sat out")
    return TierAssignment(own, {name: moved[tier] for name, tier in own.items()}, tuple(notes))


def all_alike(cohort: Sequence[str], rank: int) -> TierAssignment:
    """Assigns the whole adapter to every client."""
    everything = dict.fromkeys(cohort, rank)
    return TierAssignment(everything, everything)
