"""The lying server and the devices that collude with it: the messages they can make, the sums they can work out.

The server keeps everything that honest devices ever sent. It can open a sealed share only if a colluding device is the
receiver, and sign a vote only for a colluding device. Of a masked update

    y_i = u_i + PRG(b_i) + Σ_j ± PRG(κ_ij),   j in the U2 that device i was given

it knows PRG(b_i) once it has t shares of b_i, and PRG(κ_ij) once it has t shares of σ_i or of σ_j or if j colludes. A
linear combination of masked updates tells something if all that is unknown cancels: it may contain no device whose b is
unknown, and an unknown κ_ij only if it contains y_i and y_j alike and both have that mask. So the devices fall into
groups, joined by unknown pairwise masks, of which the server learns the sum of the whole or nothing: `opened_sums`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from secagg_model.devices import (
    Config,
    Deliver,
    Device,
    Entry,
    Keys,
    List,
    Message,
    Quorum,
    Rules,
    Session,
    numbers,
    size,
)

World = tuple[Device, ...]
"""The honest devices, by number; the devices with the next higher numbers collude with the server."""


class Input(NamedTuple):
    """A device's update in a sum. Two inputs that are equal have the same value."""

    digest: str
    round: int
    device: int
    remembers: bool


class Opened(NamedTuple):
    """A sum of honest inputs that the server can work out, and the configuration under which they were sent."""

    config: int
    inputs: frozenset[Input]

    @property
    def devices(self) -> int:
        return sum(1 << each.device for each in self.inputs)


def can_make(rules: Rules, configs: Sequence[Config], world: World, number: int, message: Message) -> bool:
    """Returns whether every signature and ciphertext in a message to a device can be had or made by the server."""
    if not isinstance(message, List | Deliver | Quorum):
        return True
    session = world[number].sessions[message.session]
    if isinstance(message, List):
        return all(
            _session(world, entry) is not None and (entry.config == session.config or not rules.binds_config)
            for entry in message.keys.entries
        ) and message.keys.config == (session.config if rules.binds_config else -1)
    if session.keys is None:
        return False
    if isinstance(message, Deliver):
        dealt = {entry.device for entry in session.keys.entries if _dealt(world, entry, session.keys)}
        return all(sender in dealt or sender >= len(world) for sender in numbers(message.sharers) if sender != number)
    if not session.votes:
        return False
    vote = session.keys, session.sharers, session.votes[-1]
    return size(voters(world, *vote)) >= configs[session.config].quorum


def voters(world: World, keys: Keys, sharers: int, survivors: int) -> int:
    """Returns the survivors whose signature over these sets the server has, or can make since they collude."""
    signed = survivors & keys.colluders
    for number, device in enumerate(world):
        for session in device.sessions:
            if session.keys == keys and session.sharers == sharers and survivors in session.votes:
                signed |= 1 << number
    return signed & survivors


def key_lists(
    rules: Rules, configs: Sequence[Config], world: World, number: int, index: int, variants: int, whole: bool
) -> Iterator[Keys]:
    """Yields the key lists that the server can make for a device's session; with `whole`, of the whole cohort only."""
    session = world[number].sessions[index]
    cohort = configs[session.config].cohort
    choices: list[list[Entry | None]] = []
    for other in numbers(cohort & ((1 << len(world)) - 1)):
        if other == number:
            choices.append([Entry(number, *session.entry)])
            continue
        signed = [
            Entry(other, *each.entry)
            for each in world[other].sessions
            if each.config == session.config or not rules.binds_config
        ]
        choices.append([*signed, *([] if whole else [None])])
    corrupt = cohort >> len(world) << len(world)
    for chosen in product(*choices):
        entries = tuple(entry for entry in chosen if entry is not None)
        for colluders in [corrupt] if whole else subsets(corrupt):
            for variant in range(variants if colluders else 1):
                yield Keys(session.config if rules.binds_config else -1, entries, colluders, variant)


def opened_sums(rules: Rules, configs: Sequence[Config], world: World) -> set[Opened]:
    """Returns every smallest sum of honest inputs that the server can work out."""
    found: set[Opened] = set()
    for keys, sessions in _by_keys(world).items():
        masked = {number: session for number, session in sessions.items() if session.sharers}
        if not masked:
            continue
        of_self, of_mask = _recovered(rules, configs, keys, sessions)
        found.update(_groups(configs, masked, of_self, of_mask, len(world)))
    return found


def subsets(devices: int) -> Iterator[int]:
    """Yields all subsets of a set, the whole set first."""
    subset = devices
    while True:
        yield subset
        if not subset:
            return
        subset = (subset - 1) & devices


def _session(world: World, entry: Entry) -> Session | None:
    return next((each for each in world[entry.device].sessions if each.entry == (entry.config, entry.nth)), None)


def _dealt(world: World, entry: Entry, keys: Keys) -> bool:
    session = _session(world, entry)
    return session is not None and session.keys == keys


def _by_keys(world: World) -> dict[Keys, dict[int, Session]]:
    """Returns the sessions of honest devices that dealt shares, by key list and device."""
    found: dict[Keys, dict[int, Session]] = defaultdict(dict)
    for number, device in enumerate(world):
        for session in device.sessions:
            if session.keys is not None:
                found[session.keys][number] = session
    return found


def _recovered(
    rules: Rules, configs: Sequence[Config], keys: Keys, sessions: dict[int, Session]
) -> tuple[set[int], set[int]]:
    """Returns the honest devices whose b, and those whose σ, the server can recover."""
    recovered: tuple[set[int], set[int]] = set(), set()
    for owner, owned in sessions.items():
        of_self = of_mask = size(keys.colluders)
        for holder in sessions.values():
            if holder.opened and holder.sharers >> owner & 1:
                survived = bool(holder.opened >> owner & 1) or not rules.reveals_one_kind
                of_self += survived
                of_mask += not survived
        threshold = configs[owned.config].threshold
        if of_self >= threshold:
            recovered[0].add(owner)
        if of_mask >= threshold:
            recovered[1].add(owner)
    return recovered


def _groups(
    configs: Sequence[Config], masked: dict[int, Session], of_self: set[int], of_mask: set[int], honest: int
) -> Iterator[Opened]:
    """Yields the sums of the groups that unknown pairwise masks join, where nothing else hides them."""
    hidden = {
        number: {
            other
            for other in numbers(session.sharers & ((1 << honest) - 1))
            if other != number and other not in of_mask and number not in of_mask
        }
        for number, session in masked.items()
    }
    left = set(masked)
    while left:
        group: set[int] = set()
        waiting, bare = [min(left)], True
        while waiting:
            number = waiting.pop()
            if number in group:
                continue
            group.add(number)
            partners = hidden[number]
            bare &= number in of_self and all(number in hidden.get(other, ()) for other in partners)
            waiting.extend(partners & masked.keys())
            waiting.extend(other for other, others in hidden.items() if number in others)
        left -= group
        if bare:
            yield Opened(
                masked[min(group)].config,
                frozenset(
                    Input(config.digest, config.round, number, masked[number].remembers)
                    for number, config in ((number, configs[masked[number].config]) for number in group)
                ),
            )
