"""Timed selection: deadline-aware, and utility-aware (Oort, Lai et al. 2021).

Both are Selections: `cohort(round_number, population)`. Predicted times are passed in; the records of a round give an
updated selection:

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

FASTEST_CLAIM, SLOWEST_CLAIM = 1e-3, 86_400.0  # seconds; claims outside are set to the bound
LOSS_CAP = 20.0  # nats; a uniform guess among 2^28 tokens
TIME_PENALTY = 2.0  # α
EXPLORE_FIRST, EXPLORE_LAST, EXPLORE_DECAY = 0.9, 0.2, 0.98
UTILITY_QUANTILE = 0.95  # utilities above it are cut to it, so that no client can claim its way into every round


@dataclass(frozen=True)
class DeadlineSelection:
    """Samples uniformly among clients that can do part of the work by the deadline, and asks more of them than wanted.

    Args:
        wanted: number of clients whose updates should arrive.
        seed: the job's.
        seconds: client -> predicted seconds of a whole round's work; a missing client counts as in time.
        overhead: seconds that a round takes beyond the predicted ones; None until a round has been measured.
    """

    wanted: int
    seed: int
    seconds: Mapping[str, float]
    overhead: float | None = None

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns sorted names, over-selected; of the whole population where no client can meet the deadline."""
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
        """Returns 1.3 times the 80th percentile of the population's predicted times, plus the overhead.

        The first round waits for all clients, which measures the overhead.
        """
        return _deadline(self.seconds, self.overhead, population)

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> DeadlineSelection:
        """Returns the selection with the overhead that the round measured."""
        del round_number
        return replace(self, overhead=_overhead(self.seconds, clients, self.overhead))


@dataclass(frozen=True)
class Observation:
    """The last observation of a client that has taken part.

    Args:
        round: the last round in which it took part.
        loss: its mean training loss in that round.
        examples: number of examples that it trained on.
    """

    round: int
    loss: float
    examples: int


@dataclass(frozen=True)
class UtilitySelection:
    """Oort: selects clients by the utility of their updates per second, and explores a share of unseen clients.

        U_i = |B_i|·loss_i · (T / t_i)^α where t_i > T,    + √(0.1·ln R / L_i) of the largest U

    with T the deadline, L_i the last round in which it took part, R the current one. Oort's root of the mean squared
    loss is replaced by the mean, which is the value that clients report. Under secure aggregation losses are not used:
    U_i is the time term.

    Args:
        wanted: number of clients whose updates should arrive; over-selected as in `DeadlineSelection`.
        seed: the job's.
        seconds: as in `DeadlineSelection`.
        example_cap: the cap on the number of examples that a client claims.
        hidden: whether losses must not be used.
        seen: client -> its last observation.
        overhead: as in `DeadlineSelection`.
    """

    wanted: int
    seed: int
    seconds: Mapping[str, float]
    example_cap: int = 1024
    hidden: bool = False
    seen: Mapping[str, Observation] = field(default_factory=dict)
    overhead: float | None = None

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns sorted names: a share of unseen clients drawn by speed, and seen clients drawn by utility."""
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
        """Returns the deadline of `DeadlineSelection`."""
        return _deadline(self.seconds, self.overhead, population)

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> UtilitySelection:
        """Returns the selection with the records of a round; dropouts add no observation."""
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


def timed_selection(job: Job, wanted: int, seconds: Mapping[str, float]) -> Selection:
    """Returns the selection of a job that selects by deadline or by utility."""
    if job.federation.selection == "utility":
        return UtilitySelection(wanted, job.training.seed, seconds, job.federation.weight_cap, job.hides_updates)
    return DeadlineSelection(wanted, job.training.seed, seconds)


def bounded_seconds(claimed: float) -> float:
    """Returns a claimed time within a millisecond and a day; a value that is not finite counts as a day."""
    return min(max(claimed, FASTEST_CLAIM), SLOWEST_CLAIM) if math.isfinite(claimed) else SLOWEST_CLAIM


def _deadline(seconds: Mapping[str, float], overhead: float | None, population: Sequence[str]) -> float | None:
    known = [bounded_seconds(seconds[name]) for name in population if name in seconds]
    return round_deadline(known) + overhead if known and overhead is not None else None


def _overhead(seconds: Mapping[str, float], clients: Sequence[ClientRecord], before: float | None) -> float | None:
    """Returns the median excess of measured over predicted times, at least 0; `before` where none was measured."""
    more = [
        client.answered - bounded_seconds(seconds[client.id])
        for client in clients
        if client.dropped is None and client.answered is not None and client.id in seconds
    ]
    return max(0.0, float(np.median(more))) if more else before


def _draw(random: np.random.Generator, names: Sequence[str], weights: Sequence[float], count: int) -> list[str]:
    """Draws without replacement, by weight, with the Gumbel trick, under which no weight needs to be positive."""
    keys = np.log(np.maximum(np.array(weights, dtype=np.float64), 1e-300)) + random.gumbel(size=len(names))
    return [names[index] for index in np.argsort(-keys, kind="stable")[:count]]
