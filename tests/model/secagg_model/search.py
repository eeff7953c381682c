"""Visits every state that the model can reach, and stops at the first that breaks a promise.

The search goes depth first over all messages that the server can make, to every device, in every order. States that
differ only in the numbers of devices that all configurations treat alike count once: each state is put into the least
form that renumbering gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations

from secagg_model.devices import (
    Announce,
    Config,
    Deliver,
    Device,
    Entry,
    Keys,
    List,
    Message,
    Open,
    Quorum,
    Restart,
    Rules,
    Session,
    answer,
    numbers,
)
from secagg_model.knowledge import World, can_make, key_lists, subsets
from secagg_model.promises import PROMISES, Situation, broken

Step = tuple[int, Message]


@dataclass(frozen=True)
class Scenario:
    """The bounds within which all states are visited.

    Attributes:
        configs: the configurations that the server may send, each to whichever device and as often as it likes.
        honest: number of honest devices; those with higher numbers in a cohort collude.
        crashes: devices may lose power between writing the log and answering.
        restarts: devices may lose power at any other time.
        variants: different keys that the server can give for a colluding device.
        losses: the exchanges before which devices may vanish, so that the set of which it tells is smaller than the
            one before: 1 for U1, 2 for U2, 3 for U3.
        sessions: the most sessions of one device.
        promises: names of the promises that are checked.
    """

    name: str
    configs: tuple[Config, ...]
    honest: int
    crashes: bool = True
    restarts: bool = True
    variants: int = 1
    losses: tuple[int, ...] = (1, 2, 3)
    sessions: int = 8
    promises: tuple[str, ...] = tuple(PROMISES)


@dataclass(frozen=True)
class Result:
    """The outcome of a search: states visited, transitions, and the steps to a state that breaks `broken`."""

    states: int
    transitions: int
    opened: int
    broken: list[str] = field(default_factory=list)
    trace: list[Step] = field(default_factory=list)


def search(scenario: Scenario, rules: Rules | None = None, visit: Callable[[World], None] | None = None) -> Result:
    """Visits all states of a scenario, from devices that have seen nothing, up to the first that breaks a promise.

    Args:
        visit: called with each state, after the states on the way to it.
    """
    rules = rules or Rules()
    names = _Names(scenario)
    start: World = (Device(),) * scenario.honest
    promises = {name: PROMISES[name] for name in scenario.promises}
    if visit:
        visit(start)
    visited = {names.least(start)}
    path: list[tuple[Step | None, Iterator[tuple[Step, World]]]] = [(None, successors(scenario, rules, start))]
    transitions = opened = 0
    while path:
        following = next(path[-1][1], None)
        if following is None:
            path.pop()
            continue
        step, world = following
        transitions += 1
        if (form := names.least(world)) in visited:
            continue
        visited.add(form)
        situation = Situation(rules, scenario.configs, world)
        opened += bool(situation.opened)
        if found := broken(situation, promises):
            trace = [taken for taken, _ in path if taken is not None]
            return Result(len(visited), transitions, opened, found, [*trace, step])
        if visit:
            visit(world)
        path.append((step, successors(scenario, rules, world)))
    return Result(len(visited), transitions, opened)


def successors(scenario: Scenario, rules: Rules, world: World) -> Iterator[tuple[Step, World]]:
    """Yields every step that the server can bring about, and the state after it."""
    for number, device in enumerate(world):
        for message in messages(scenario, rules, world, number):
            if not can_make(rules, scenario.configs, world, number, message):
                continue
            after = answer(rules, scenario.configs, number, device, message)
            if after is not None and len(after.sessions) <= scenario.sessions:
                yield (number, message), (*world[:number], after, *world[number + 1 :])


def messages(scenario: Scenario, rules: Rules, world: World, number: int) -> Iterator[Message]:
    """Yields the messages of the scenario's alphabet for a device in its state; most of them it will refuse."""
    device = world[number]
    crashes = (False, True) if scenario.crashes else (False,)
    for index in device.live:
        session = device.sessions[index]
        if session.votes:
            yield Quorum(index)
        if session.sharers:
            for survivors in subsets(session.sharers) if 3 in scenario.losses else [session.sharers]:
                yield Announce(index, survivors)
        elif session.keys is not None:
            for sharers in subsets(session.keys.listed) if 2 in scenario.losses else [session.keys.listed]:
                yield from (Deliver(index, sharers, crash) for crash in crashes)
        else:
            whole = 1 not in scenario.losses
            for keys in key_lists(rules, scenario.configs, world, number, index, scenario.variants, whole):
                yield List(index, keys)
    for config in range(len(scenario.configs)):
        yield from (Open(config, crash) for crash in crashes)
    if scenario.restarts:
        yield Restart()


class _Names:
    """Renumberings of the honest devices that leave every configuration as it is, applied to states."""

    def __init__(self, scenario: Scenario) -> None:
        everyone = (1 << scenario.honest) - 1
        cohorts = {config.cohort & everyone for config in scenario.configs}
        self._orders = [
            order
            for order in permutations(range(scenario.honest))
            if all(_renumbered(cohort, order) == cohort for cohort in cohorts)
        ]
        self._known: dict[Device, int] = {}
        self._images: list[list[int]] = []

    def least(self, world: World) -> tuple[int, ...]:
        images = [self._images[self._number(device)] for device in world]
        forms = []
        for at, order in enumerate(self._orders):
            form = [0] * len(world)
            for number, image in enumerate(images):
                form[order[number]] = image[at]
            forms.append(tuple(form))
        return min(forms)

    def _number(self, device: Device) -> int:
        known = self._known.get(device)
        if known is None:
            known = self._intern(device)
            self._images[known] = [self._intern(_renamed(device, order)) for order in self._orders]
        elif not self._images[known]:
            self._images[known] = [self._intern(_renamed(device, order)) for order in self._orders]
        return known

    def _intern(self, device: Device) -> int:
        if device not in self._known:
            self._known[device] = len(self._images)
            self._images.append([])
        return self._known[device]


def _renumbered(devices: int, order: tuple[int, ...]) -> int:
    kept = devices >> len(order) << len(order)
    return kept | sum(1 << order[number] for number in numbers(devices & ((1 << len(order)) - 1)))


def _renamed(device: Device, order: tuple[int, ...]) -> Device:
    def session(each: Session) -> Session:
        keys = each.keys
        if keys is not None:
            entries = sorted(Entry(order[entry.device], entry.config, entry.nth) for entry in keys.entries)
            keys = Keys(keys.config, tuple(entries), keys.colluders, keys.variant)
        sets = tuple(_renumbered(votes, order) for votes in each.votes)
        return Session(
            each.config, each.nth, keys, _renumbered(each.sharers, order), each.remembers, sets,
            _renumbered(each.opened, order),
        )  # fmt: skip

    return Device(device.log, tuple(map(session, device.sessions)), device.live)
