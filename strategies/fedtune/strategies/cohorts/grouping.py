"""The cutting of a cohort into groups, each with a secure sum of its own.

    grouping = cut_cohort(job, number, names, state.suspicion)
    grouping.groups                                 # each with enough clients for a sum

Clients come into groups at random, by the job's seed and the round. Suspects of failed sums are dealt evenly over the
groups; while there are any, a round has at least two groups for each circle of them, if clients are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.core.job.secure_cohorts import group_sizes, most_groups
from fedtune.core.job.settings import Job
from fedtune.core.seeds import generator
from fedtune.strategies.cohorts.suspicion import NOBODY, Suspicion


@dataclass(frozen=True)
class Grouping:
    """The groups of one round.

    Args:
        groups: the clients of each group, in the cohort's order.
        notes: one sentence about a number of groups that differs from the job's.
    """

    groups: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        """The number of clients of the largest group."""
        return max(map(len, self.groups))


def cut_cohort(job: Job, number: int, names: Sequence[str], suspicion: Suspicion, *, tiers: int = 1) -> Grouping:
    """Cuts the clients of a round's cohort into nearly equal groups.

    Args:
        number: the round's.
        names: clients that are asked to train.
        suspicion: what earlier rounds tell about clients whose sums failed.
        tiers: number of tiers in the round; several are not cut, since each group would need enough clients of each.
    """
    whole, wanted = Grouping((tuple(names),)), job.secure_aggregation.groups
    circles = [circle for circle in suspicion.circles if circle.suspects & set(names)]
    aimed = max(wanted, 2 * len(circles))
    if aimed == 1:
        return whole
    count = 1 if tiers > 1 else most_groups(job, len(names), aimed)
    notes = []
    if count < wanted:
        notes.append(f"cut into {count} of {wanted} groups: {len(names)} clients are too few for more")
    if count > wanted:
        notes.append(f"cut into {count} groups, to find who made a sum fail")
    if circles and count == 1:
        reason = "several tiers" if tiers > 1 else f"{len(names)} clients, too few for two groups"
        notes.append(f"suspects of a failed sum cannot be told apart: the round has {reason}")
    if count == 1:
        return Grouping(whole.groups, tuple(notes))
    random = generator(job.training.seed, "groups", number)
    dealt = [name for circle in circles for name in random.permutation(sorted(circle.suspects & set(names))).tolist()]
    companions = NOBODY.union(*(circle.companions for circle in circles))
    others = random.permutation(sorted(set(names) - set(dealt))).tolist()
    rest = iter(sorted(others, key=companions.__contains__))  # keeps the order otherwise
    groups = [set(dealt[place::count]) for place in range(count)]
    for group, size in zip(groups, group_sizes(len(names), count), strict=True):
        while len(group) < size:
            group.add(next(rest))
    return Grouping(tuple(tuple(name for name in names if name in group) for group in groups), tuple(notes))
