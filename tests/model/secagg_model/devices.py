"""An honest device as a state machine over symbols: which messages it answers, and what it remembers.

    device = Device()
    device = answer(rules, configs, number, device, Open(0))  # None where the device refuses

Keys, shares, masks and signatures are not values here. What a device has ever sent follows from its `sessions`, and the
server keeps all of it. Whether the server can make a message at all, `knowledge.can_make` says; `answer` holds the
checks that a device does by itself. Devices are numbered, and a set of devices is a bit mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

CLOSED = 1 << 20
"""The attempt that a device writes into its log when it closes a round."""


@dataclass(frozen=True)
class Rules:
    """The rules by which a device stays safe; one that is switched off makes a mutant of the model.

    Attributes:
        floor: takes at least one device of a cohort to collude, however small the cohort is.
        checks_quorum, checks_threshold: refuses a configuration below its own bounds.
        counts_survivors: refuses a set of survivors below the configuration's minimum.
        votes_once: signs one set of survivors in a session.
        keeps_log: writes the round into its log.
        log_first: writes the log before the answer leaves, not after.
        closes_round: writes into the log that the round is closed when its masked update leaves.
        one_session: a new round ends the session that is open.
        reveals_one_kind: reveals a share of σ, not of b, for a device that is no survivor.
        binds_config: keys, shares and votes are bound to the digest of the configuration.
        forgets: nothing that a device remembers of earlier rounds enters an update.
        log_by_digest: keeps the log by what updates follow from, not by a job's name.
    """

    floor: bool = True
    checks_quorum: bool = True
    checks_threshold: bool = True
    counts_survivors: bool = True
    votes_once: bool = True
    keeps_log: bool = True
    log_first: bool = True
    closes_round: bool = True
    one_session: bool = True
    reveals_one_kind: bool = True
    binds_config: bool = True
    forgets: bool = True
    log_by_digest: bool = True


@dataclass(frozen=True)
class Config:
    """A configuration that the server may send; two that differ anywhere have different digests.

    Attributes:
        digest: what updates follow from besides round and device: seed, work, base.
        adapter: digest of the adapter, on which the devices must agree.
        cohort: invited devices.
    """

    round: int
    attempt: int
    cohort: int
    threshold: int
    quorum: int
    minimum: int
    job: str = "job"
    digest: str = "job"
    adapter: str = "adapter"


class Entry(NamedTuple):
    """The signed keys of an honest device: those of its `nth` session under a configuration."""

    device: int
    config: int
    nth: int


class Keys(NamedTuple):
    """A key list. `variant` tells apart lists that differ in the keys of colluding devices alone."""

    config: int
    entries: tuple[Entry, ...]
    colluders: int
    variant: int

    @property
    def listed(self) -> int:
        return self.colluders | sum(1 << entry.device for entry in self.entries)


class Session(NamedTuple):
    """A device's side of one attempt at a round, with everything it has sent in it.

    Attributes:
        keys: the key list for which it dealt shares.
        sharers: U2, over which it masked its update; 0 before.
        remembers: its update contains something that it kept from an earlier round.
        votes: the sets U3 that it signed, the last one valid.
        opened: the set U3 for which it revealed its shares; 0 before.
    """

    config: int
    nth: int
    keys: Keys | None = None
    sharers: int = 0
    remembers: bool = False
    votes: tuple[int, ...] = ()
    opened: int = 0

    @property
    def entry(self) -> tuple[int, int]:
        return self.config, self.nth


class Device(NamedTuple):
    """A device: its log, which outlives a restart, all its sessions in order, and the indices of those still alive."""

    log: tuple[tuple[str, int, int], ...] = ()
    sessions: tuple[Session, ...] = ()
    live: tuple[int, ...] = ()

    def last(self, job: str) -> tuple[int, int]:
        return next(((round_, attempt) for name, round_, attempt in self.log if name == job), (-1, -1))


class Open(NamedTuple):
    """Exchange 0. With `crash` the device loses power between writing its log and answering, in its own order."""

    config: int
    crash: bool = False


class List(NamedTuple):
    """Exchange 1: the key list, for the device's session with this index."""

    session: int
    keys: Keys


class Deliver(NamedTuple):
    """Exchange 2: U2 and the encrypted shares. `crash` as in `Open`."""

    session: int
    sharers: int
    crash: bool = False


class Announce(NamedTuple):
    """Exchange 3: U3."""

    session: int
    survivors: int


class Quorum(NamedTuple):
    """Exchange 4: the votes of a quorum."""

    session: int


class Restart(NamedTuple):
    """The device loses power, and with it whatever is not in its log."""


Message = Open | List | Deliver | Announce | Quorum | Restart


def size(devices: int) -> int:
    return devices.bit_count()


def numbers(devices: int) -> Iterator[int]:
    """Yields the devices of a set in increasing order."""
    while devices:
        lowest = devices & -devices
        yield lowest.bit_length() - 1
        devices ^= lowest


def majority(cohort: int, colluders: int) -> int:
    """Returns the smallest q such that two sets of q devices share more than `colluders` of them."""
    return (cohort + colluders) // 2 + 1


MAX_CORRUPT = 0.1
MIN_SURVIVORS = 3


def least_threshold(rules: Rules, config: Config) -> int:
    """Returns the smallest threshold, and the smallest quorum, to which a device agrees."""
    n = size(config.cohort)
    return majority(n, max(int(rules.floor), int(MAX_CORRUPT * n)))


def accepts(rules: Rules, config: Config, number: int) -> bool:
    """Returns whether a device agrees to a configuration, by its own policy."""
    least = least_threshold(rules, config)
    return (
        bool(config.cohort >> number & 1)
        and (not rules.checks_quorum or config.quorum >= least)
        and (not rules.checks_threshold or config.threshold >= least)
        and config.minimum >= max(MIN_SURVIVORS, config.quorum)
    )


def answer(rules: Rules, configs: tuple[Config, ...], number: int, device: Device, message: Message) -> Device | None:
    """Returns the device after it has answered a message, or None if it refuses.

    The message is taken to hold what it claims to hold: whether signatures and ciphertexts in it can be made is the
    server's concern (`knowledge.can_make`).
    """
    match message:
        case Restart():
            return device._replace(live=()) if device.live else None
        case Open(index, crash):
            return _open(rules, configs[index], index, number, device, crash)
    if message.session not in device.live:
        return None
    session = device.sessions[message.session]
    config = configs[session.config]
    own = 1 << number
    match message:
        case List(_, keys):
            mine = Entry(number, *session.entry)
            if session.keys is not None or mine not in keys.entries or keys.listed & ~config.cohort:
                return None
            if size(keys.listed) < config.minimum:
                return None
            return _with(device, message.session, session._replace(keys=keys))
        case Deliver(at, sharers, crash):
            if session.keys is None or session.sharers or sharers & ~session.keys.listed or not sharers & own:
                return None
            if size(sharers) < config.minimum:
                return None
            remembers = not rules.forgets and any(earlier.sharers for earlier in device.sessions)
            closed = _logged(rules, device, config, CLOSED) if rules.closes_round else device.log
            masked = _with(device, at, session._replace(sharers=sharers, remembers=remembers))
            if not crash:
                return masked._replace(log=closed)
            return device._replace(log=closed, live=()) if rules.log_first else masked._replace(live=())
        case Announce(_, survivors):
            if not session.sharers or survivors & ~session.sharers or not survivors & own:
                return None
            if rules.counts_survivors and size(survivors) < config.minimum:
                return None
            if session.votes and (rules.votes_once or survivors in session.votes):
                return None
            return _with(device, message.session, session._replace(votes=(*session.votes, survivors)))
        case Quorum(at):
            if not session.votes:
                return None
            revealed = _with(device, at, session._replace(opened=session.votes[-1]))
            return revealed._replace(live=tuple(live for live in device.live if live != at))
    raise TypeError(f"unknown message: {message}")


def _open(rules: Rules, config: Config, index: int, number: int, device: Device, crash: bool) -> Device | None:
    if not accepts(rules, config, number) or (config.round, config.attempt) <= device.last(_log_key(rules, config)):
        return None
    logged = _logged(rules, device, config, config.attempt) if rules.keeps_log else device.log
    if crash and rules.log_first:
        return device._replace(log=logged, live=())
    nth = sum(session.config == index for session in device.sessions)
    sessions = (*device.sessions, Session(index, nth))
    if crash:
        return Device(device.log, sessions, ())
    kept = () if rules.one_session else device.live
    return Device(logged, sessions, (*kept, len(device.sessions)))


def _with(device: Device, at: int, session: Session) -> Device:
    return device._replace(sessions=(*device.sessions[:at], session, *device.sessions[at + 1 :]))


def _log_key(rules: Rules, config: Config) -> str:
    return config.digest if rules.log_by_digest else config.job


def _logged(rules: Rules, device: Device, config: Config, attempt: int) -> tuple[tuple[str, int, int], ...]:
    key = _log_key(rules, config)
    others = [mark for mark in device.log if mark[0] != key]
    return tuple(sorted([*others, (key, config.round, attempt)]))
