"""The promises of docs/secure-aggregation.md, across rounds, which every state of the model must keep.

Each promise is a function of a state that returns whether it is kept; `broken` names those that are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

from secagg_model.devices import Config, Keys, Rules, Session, least_threshold, size
from secagg_model.knowledge import Opened, World, opened_sums, voters


class Agreed(NamedTuple):
    """A survivor set for which the server has, or can have, a quorum of votes."""

    config: int
    keys: Keys
    sharers: int
    survivors: int


@dataclass(frozen=True)
class Situation:
    """A state of the model, with what follows from it."""

    rules: Rules
    configs: tuple[Config, ...]
    world: World

    @cached_property
    def opened(self) -> set[Opened]:
        return opened_sums(self.rules, self.configs, self.world)

    @cached_property
    def agreed(self) -> set[Agreed]:
        found = set()
        for _, session in self.sessions():
            for survivors in session.votes:
                assert session.keys is not None
                count = size(voters(self.world, session.keys, session.sharers, survivors))
                if count >= self.configs[session.config].quorum:
                    found.add(Agreed(session.config, session.keys, session.sharers, survivors))
        return found

    @property
    def honest(self) -> int:
        return (1 << len(self.world)) - 1

    def sessions(self) -> Iterator[tuple[int, Session]]:
        for number, device in enumerate(self.world):
            for session in device.sessions:
                yield number, session


def _enough(at: Situation) -> bool:
    """A sum that opens covers n_min − c honest devices, and belongs to a survivor set of at least n_min."""
    for sum_ in at.opened:
        config = at.configs[sum_.config]
        if size(sum_.devices) < config.minimum - size(config.cohort & ~at.honest):
            return False
        if not any(size(each.survivors) >= config.minimum for each in at.agreed if each.config == sum_.config):
            return False
    return True


def _one_set(at: Situation) -> bool:
    """No two survivor sets of one configuration find a quorum, and no two sums of it open."""
    agreed, opened = ([each.config for each in many] for many in (at.agreed, at.opened))
    return len(set(agreed)) == len(agreed) and len(set(opened)) == len(opened)


def _dropouts(at: Situation) -> bool:
    """A sum that opens is that of the honest devices in a survivor set that was agreed, all of them and no others."""
    return all(
        any(each.config == sum_.config and each.survivors & at.honest == sum_.devices for each in at.agreed)
        for sum_ in at.opened
    )


def _same(at: Situation) -> bool:
    """Devices that reveal their shares for one survivor set were all told the same configuration."""
    told: dict[tuple[Keys | None, int, int], set[int]] = defaultdict(set)
    for _, session in at.sessions():
        if session.opened:
            told[session.keys, session.sharers, session.opened].add(session.config)
    return all(len(configs) == 1 for configs in told.values())


def _served_once(at: Situation) -> bool:
    """No device answers one attempt at a round twice, nor any attempt at a round for which it has masked its update."""
    for device in at.world:
        marks = [at.configs[session.config] for session in device.sessions]
        if len({(config.job, config.round, config.attempt) for config in marks}) < len(marks):
            return False
        for index, session in enumerate(device.sessions):
            mine = marks[index]
            later = ((config.job, config.round) for config in marks[index + 1 :])
            if session.sharers and (mine.job, mine.round) in later:
                return False
    return True


def _memory(at: Situation) -> bool:
    """No update contains what a device kept from an earlier round, which no configuration names."""
    return not any(session.remembers for _, session in at.sessions())


def _apart(at: Situation) -> bool:
    """Every combination of sums other than zero covers the honest part of a threshold, over all rounds and jobs."""
    least = min(least_threshold(at.rules, config) - size(config.cohort & ~at.honest) for config in at.configs)
    return smallest_support([{*sum_.inputs} for sum_ in at.opened]) >= least


def _summed_once(at: Situation) -> bool:
    """No input is in two sums that open."""
    return all(not one.inputs & other.inputs for one, other in combinations(at.opened, 2))


PROMISES: Mapping[str, Callable[[Situation], bool]] = {
    "enough survivors": _enough,
    "one survivor set": _one_set,
    "dropouts hidden": _dropouts,
    "same configuration": _same,
    "served once": _served_once,
    "no memory": _memory,
    "combinations": _apart,
    "summed once": _summed_once,
}


def broken(situation: Situation, promises: Mapping[str, Callable[[Situation], bool]] = PROMISES) -> list[str]:
    """Returns the names of the promises that a state breaks."""
    return [name for name, kept in promises.items() if not kept(situation)]


def smallest_support(sums: list[set[object]]) -> float:
    """Returns the fewest inputs that a combination of sums other than zero covers; infinity without sums.

    A combination without the inputs Z exists if the sums, as vectors of 0 and 1, have a smaller rank on Z than in all.
    """
    inputs = sorted(set[object]().union(*sums), key=repr)
    if not inputs:
        return float("inf")
    if all(not one & other for one, other in combinations(sums, 2)):
        return min(map(len, sums))
    rows = [[int(each in sum_) for each in inputs] for sum_ in sums]
    whole = _rank(rows)
    for kept in range(1, len(inputs) + 1):
        for without in combinations(range(len(inputs)), len(inputs) - kept):
            if _rank([[row[column] for column in without] for row in rows]) < whole:
                return kept
    return len(inputs)


def _rank(rows: list[list[int]], prime: int = 10_007) -> int:
    """Returns the rank of a small matrix of 0 and 1, over a prime field whose prime none of its minors reaches."""
    rows, rank = [row[:] for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((index for index in range(rank, len(rows)) if rows[index][column] % prime), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, prime)
        for index in range(rank + 1, len(rows)):
            factor = rows[index][column] * inverse % prime
            rows[index] = [(a - factor * b) % prime for a, b in zip(rows[index], rows[rank], strict=True)]
        rank += 1
    return rank
