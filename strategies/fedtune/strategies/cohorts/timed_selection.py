"""Cohorts chosen by what clients take and bring: deadline-aware, and utility-aware (Oort, Lai et al. 2021).

Both are Selections: `cohort(round_number, population)`. What they know of clients is handed in; what a round teaches
gives a new one:

    selection = selection.learned(number, record.clients)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedtune.core.job.settings import Job
from fedtune.core.round_records import ClientRecord
from fedtune.core.round_timing import over_selected, round_deadline, work_share
from fedtune.core.seeds import generator
from fedtune.strategies.cohorts.selection import Selection

FASTEST_CLAIM, SLOWEST_CLAIM = 1e-3, 86_400.0  # seconds; what a client says beyond them is taken as the bound
LOSS_CAP = 20.0  # nats; a uniform guess among 2^28 tokens
TIME_PENALTY = 2.0  # α
EXPLORE_FIRST, EXPLORE_LAST, EXPLORE_DECAY = 0.9, 0.2, 0.98
UTILITY_QUANTILE = 0.95  # utilities above it count as much as it: one client cannot buy every round


@dataclass(frozen=True)
class DeadlineSelection:
    """Uniform among those that can do at least part of the work by the deadline, and more of them than are wanted.

    Args:
        wanted: clients that shall arrive.
        seed: the job's.
        seconds: client -> predicted seconds for a whole round's work; one that is missing counts as in time.
        overhead: seconds that a round takes beyond those; None until a round has shown it.
    """

    wanted: int
    seed: int
    seconds: Mapping[str, float]
    overhead: float | None = None

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Names in order, over-selected; everybody where nobody could be in time."""
        names = sorted(population)
        known = [bounded_seconds(self.seconds[name]) for name in names if name in self.seconds]
        if known:
            deadline = round_deadline(known)
            able = [n for n in names if n not in self.seconds or work_share(bounded_seconds(self.seconds[n]), deadline)]
            names = able or names
        count = over_selected(self.wanted, len(names))
        chosen = generator(self.seed, "cohort", round_number).choice(len(names), size=count, replace=False)
        return [names[index] for index in sorted(chosen)]

    def deadline(self, population: Sequence[str]) -> float | None:
        """1.3 times the 80th percentile of what the population is predicted to take, and the overhead; the first
        round waits for everybody, and shows it."""
        return _deadline(self.seconds, self.overhead, population)

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> DeadlineSelection:
        """With what the round took beyond what was predicted."""
        del round_number
        return replace(self, overhead=_overhead(self.seconds, clients, self.overhead))


@dataclass(frozen=True)
class Observation:
    """What is known of a client that has taken part.

    Args:
        round: the last in which it did.
        loss: its mean training loss then.
        examples: it trained on.
    """

    round: int
    loss: float
    examples: int


@dataclass(frozen=True)
class UtilitySelection:
    """Oort: clients whose updates should teach most a second, and a share of clients not yet seen.

        U_i = |B_i|·loss_i · (T / t_i)^α where t_i > T,    + √(0.1·ln R / L_i) of the largest U

    with T the deadline, L_i the last round it took part in, R this one. Oort's root of the mean squared loss is taken
    by its mean, which is what clients report. Under secure aggregation losses are not looked at: U_i is the time term.

    Args:
        wanted: clients that shall arrive; as many more are asked as `DeadlineSelection` asks.
        seed: the job's.
        seconds: as `DeadlineSelection`.
        example_cap: what a client says beyond it counts as it.
        hidden: whether losses may not be looked at.
        seen: client -> what is known of it.
        overhead: as `DeadlineSelection`.
    """

    wanted: int
    seed: int
    seconds: Mapping[str, float]
    example_cap: int = 1024
    hidden: bool = False
    seen: Mapping[str, Observation] = field(default_factory=dict)
    overhead: float | None = None

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Names in order: a share at random by speed among the unseen, the rest by utility among the seen."""
        names = sorted(population)
        count = over_selected(self.wanted, len(names))
        random = generator(self.seed, "cohort", round_number)
        times = {name: bounded_seconds(self.seconds.get(name, 1.0)) for name in names}
        deadline = round_deadline(times.values())
        unseen = [name for name in names if name not in self.seen]
        seen = [name for name in names if name in self.seen]
        share = max(EXPLORE_LAST, EXPLORE_FIRST * EXPLORE_DECAY ** (round_number - 1))
        exploring = min(len(unseen), max(round(share * count), count - len(seen)))
        chosen = _draw(random, unseen, [1.0 / times[name] for name in unseen], exploring)
        utilities = self._utilities(seen, times, deadline, round_number)
        chosen += _draw(random, seen, utilities, count - exploring)
        return sorted(chosen)

    def deadline(self, population: Sequence[str]) -> float | None:
        """As of `DeadlineSelection`."""
        return _deadline(self.seconds, self.overhead, population)

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> UtilitySelection:
        """The selection after a round; who was dropped teaches nothing."""
        news = {
            client.id: Observation(
                round_number, min(client.loss or 0.0, LOSS_CAP), min(client.examples, self.example_cap)
            )
            for client in clients
            if client.dropped is None
        }
        overhead = _overhead(self.seconds, clients, self.overhead)
        return replace(self, seen={**self.seen, **news}, overhead=overhead)

    def _utilities(
        self, names: Sequence[str], times: Mapping[str, float], deadline: float, round_number: int
    ) -> list[float]:
        if not names:
            return []
        taught = [1.0 if self.hidden else self.seen[name].examples * self.seen[name].loss for name in names]
        cap = float(np.quantile(taught, UTILITY_QUANTILE))
        fresh = [math.sqrt(0.1 * math.log(max(round_number, 2)) / max(self.seen[n].round, 1)) for n in names]
        return [
            (min(gain, cap) + bonus * cap) * min(1.0, deadline / times[name]) ** TIME_PENALTY
            for name, gain, bonus in zip(names, taught, fresh, strict=True)
        ]


def timed_selection(job: Job, wanted: int, seconds: Mapping[str, float]) -> Selection | None:
    """The job's selection, where it goes by the time that clients take; None where it does not."""
    match job.federation.selection:
        case "deadline":
            return DeadlineSelection(wanted, job.training.seed, seconds)
        case "utility":
            cap, hidden = job.federation.weight_cap, job.hides_updates
            return UtilitySelection(wanted, job.training.seed, seconds, cap, hidden)
    return None


def bounded_seconds(claimed: float) -> float:
    """A time a client may claim: at least a millisecond, at most a day; what is no number is a day."""
    return min(max(claimed, FASTEST_CLAIM), SLOWEST_CLAIM) if math.isfinite(claimed) else SLOWEST_CLAIM


def _deadline(seconds: Mapping[str, float], overhead: float | None, population: Sequence[str]) -> float | None:
    known = [bounded_seconds(seconds[name]) for name in population if name in seconds]
    return round_deadline(known) + overhead if known and overhead is not None else None


def _overhead(seconds: Mapping[str, float], clients: Sequence[ClientRecord], before: float | None) -> float | None:
    """The median of what clients took beyond what was predicted, at least 0; as before where nobody answered."""
    more = [
        client.answered - bounded_seconds(seconds[client.id])
        for client in clients
        if client.dropped is None and client.answered is not None and client.id in seconds
    ]
    return max(0.0, float(np.median(more))) if more else before


def _draw(random: np.random.Generator, names: Sequence[str], weights: Sequence[float], count: int) -> list[str]:
    """Without replacement, by weight; by Gumbel's trick, which needs no weight to be positive in the sum."""
    keys = np.log(np.maximum(np.array(weights, dtype=np.float64), 1e-300)) + random.gumbel(size=len(names))
    return [names[index] for index in np.argsort(-keys, kind="stable")[:count]]
