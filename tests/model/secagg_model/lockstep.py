"""Real client sessions in step with the model: each answers a message if, and only if, the model's device does.

The search hands over every state that it reaches. In each, every honest device is sent every message of a wide
alphabet: in order and out of it, of any sets, with the signatures and ciphertexts that the server has, and forged ones
where it has none. A session's answers follow from its own history and from the message, so each pair is tried once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.core.secagg import (
    ClientSession,
    Identity,
    Member,
    Policy,
    Roster,
    RoundConfig,
    RoundMark,
    Segment,
    Served,
    ServerFaultError,
)
from fedtune.core.secagg.client_session import Advertised
from fedtune.core.secagg.exchanged import (
    ENCRYPTED_SHARE_BYTES,
    MAX_COUNTER,
    Delivery,
    EncryptedShares,
    KeyEntry,
    KeyList,
    Survivors,
    Vote,
    decode,
    encode,
    pieces,
)
from fedtune.core.secagg.exchanged import Quorum as QuorumMessage
from fedtune.core.secagg.primitives import SIGNATURE_BYTES, Agreement, seal
from fedtune.core.secagg.transcript import Transcript, advertisement_statement, config_digest, mask_agreement
from secagg_model.devices import (
    CLOSED,
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
    answer,
    numbers,
)
from secagg_model.knowledge import World, can_make, subsets, voters
from secagg_model.search import Scenario

BASE, ADAPTER = "0" * 64, "1" * 64
UPDATE = {"v": np.array([1], np.uint64)}
ANY_SIZE = 1 << 20


class PowerLossError(Exception):
    """The device lost power right after it wrote its log."""


class Log:
    """A round log that can lose power after it was written."""

    def __init__(self, jobs: Mapping[str, Served]) -> None:
        self.jobs, self.fails = dict(jobs), False

    def of(self, job: str) -> Served:
        return self.jobs.get(job, Served())

    def record(self, job: str, served: Served) -> None:
        self.jobs[job] = served
        if self.fails:
            raise PowerLossError

    @property
    def rho(self) -> float:
        return sum(served.rho for served in self.jobs.values())


class Stream:
    """Bytes that follow from a name, for secrets that are the same whenever a history is repeated."""

    def __init__(self, name: str) -> None:
        self._name, self._drawn = name, 0

    def __call__(self, size: int) -> bytes:
        self._drawn += 1
        return hashlib.shake_256(f"{self._name} {self._drawn}".encode()).digest(size)


@dataclass
class Real:
    """A device's log and its session, if one is open."""

    log: Log
    session: ClientSession | None = None


@dataclass
class Lockstep:
    """The real devices of a scenario, by number and by the history that the model gives them."""

    scenario: Scenario
    rules: Rules = field(default_factory=Rules)
    tried: int = 0

    def __post_init__(self) -> None:
        every = max(config.cohort for config in self.scenario.configs).bit_length()
        self._identities = [Identity.generate(Stream(f"identity {number}")) for number in range(every)]
        self._roster = Roster({_name(number): each.public for number, each in enumerate(self._identities)})
        self._configs = [self._config(index) for index in range(len(self.scenario.configs))]
        self._digests = [config_digest(config) for config in self._configs]
        self._real = {(number, Device()): Real(Log({})) for number in range(self.scenario.honest)}
        self._entries: dict[Entry, KeyEntry] = {}
        self._dealt: dict[tuple[Entry, Keys], list[bytes]] = {}
        self._votes: dict[tuple[int, Keys, int, int], bytes] = {}
        self._outcomes: set[object] = set()

    def visit(self, world: World) -> None:
        """Sends every message to every device of a state.

        Raises:
            AssertionError: a real session answers what the model's device refuses, or the other way round.
        """
        for number in range(len(world)):
            for message in self._alphabet(world, number):
                parts = self._parts(world, number, message)
                key = number, world[number], message, parts
                if key not in self._outcomes:
                    self._outcomes.add(key)
                    self._compare(world, number, message)

    def _compare(self, world: World, number: int, message: Message) -> None:
        self.tried += 1
        device = world[number]
        possible = can_make(self.rules, self.scenario.configs, world, number, message)
        expected = answer(self.rules, self.scenario.configs, number, device, message) if possible else None
        before = self._real[number, device]
        after = Real(Log(before.log.jobs), copy.deepcopy(before.session))
        if after.session is not None:
            after.session.log = after.log
        replied = self._send(world, number, message, after)
        assert replied == (expected is not None), f"device {number} in {device}: {message}"
        if expected is None:
            assert after.log.jobs == before.log.jobs, f"device {number} refuses {message}, but writes its log"
            return
        logged = {job: RoundMark(round_, attempt) for job, round_, attempt in expected.log}
        real = {
            job: RoundMark(served.last.round, CLOSED if served.last.attempt == MAX_COUNTER else served.last.attempt)
            for job, served in after.log.jobs.items()
        }
        assert real == logged, f"device {number} in {device}: {message}"
        self._real.setdefault((number, expected), after)

    def _send(self, world: World, number: int, message: Message, real: Real) -> bool:
        """Returns whether the real device takes the message; keeps what it sends."""
        device = world[number]
        try:
            match message:
                case Restart():
                    real.session = None
                    return bool(device.live)
                case Open(index, crash):
                    nth = sum(session.config == index for session in device.sessions)
                    session = self._session(number, f"{number} {index} {nth}", real.log)
                    real.log.fails = crash
                    session.advertise(encode(self._configs[index]), base_digest=BASE, adapter_digest=ADAPTER)
                    assert isinstance(session.state, Advertised)
                    self._entries[Entry(number, index, nth)] = session.state.entry
                    real.session = session
                    return True
            assert real.session is not None
            model = device.sessions[message.session]
            digest = self._digests[model.config]
            match message:
                case List(_, keys):
                    entries = tuple(self._listed(world, keys, model.config))
                    reply = decode(real.session.share(encode(KeyList(digest, entries))), EncryptedShares, ANY_SIZE)
                    dealt = pieces(reply.encrypted_shares, ENCRYPTED_SHARE_BYTES)
                    self._dealt[Entry(number, *model.entry), keys] = dealt
                case Deliver(_, sharers, crash):
                    real.log.fails = crash
                    shares = b"".join(self._sealed(world, number, model.keys, sharers)) if model.keys else b""
                    real.session.mask(encode(Delivery(digest, tuple(numbers(sharers)), shares)), UPDATE)
                case Announce(_, survivors):
                    signed = real.session.vote(encode(Survivors(digest, tuple(numbers(survivors)))))
                    assert model.keys is not None
                    vote = number, model.keys, model.sharers, survivors
                    self._votes[vote] = decode(signed, Vote, ANY_SIZE).signature
                case Quorum():
                    real.session.unmask(self._quorum(world, number, message.session))
                    real.session = None
        except PowerLossError:
            real.session, real.log.fails = None, False
        except ServerFaultError:
            return False
        return True

    def _parts(self, world: World, number: int, message: Message) -> object:
        """Returns which signatures and ciphertexts of a message the server has."""
        match message:
            case List(_, keys):
                return tuple(
                    any(each.entry == entry[1:] for each in world[entry.device].sessions) for entry in keys.entries
                )
            case Deliver(at, sharers, _) if (own := world[number].sessions[at]).keys is not None:
                there = {(each.device, each[1:]) for each in own.keys.entries if each.device != number}
                return frozenset(
                    other
                    for other, entry in there
                    if sharers >> other & 1
                    and any(each.entry == entry and each.keys == own.keys for each in world[other].sessions)
                )
            case Quorum(at) if (own := world[number].sessions[at]).votes and own.keys is not None:
                return voters(world, own.keys, own.sharers, own.votes[-1])
        return None

    def _alphabet(self, world: World, number: int) -> Iterator[Message]:
        for config in range(len(self.scenario.configs)):
            yield Open(config)
            yield Open(config, crash=True)
        yield Restart()
        device, honest = world[number], (1 << len(world)) - 1
        for at in device.live:
            index = device.sessions[at].config
            cohort = self.scenario.configs[index].cohort
            yield Quorum(at)
            for devices in subsets(cohort):
                entries = tuple(Entry(other, index, 0) for other in numbers(devices & honest))
                yield List(at, Keys(index, entries, devices & ~honest, 0))
                yield Deliver(at, devices)
                yield Deliver(at, devices, crash=True)
                yield Announce(at, devices)

    def _listed(self, world: World, keys: Keys, index: int) -> Iterator[KeyEntry]:
        for number in numbers(keys.listed):
            entry = next((each for each in keys.entries if each.device == number), None)
            if entry is not None and any(each.entry == entry[1:] for each in world[number].sessions):
                yield self._entries[entry]
                continue
            signer = self._identities[
                -1 if entry is not None else number
            ]  # a colluder's key, for want of the right one
            own = self._share_key(number, index), mask_agreement(Stream(f"mask {number} {index}")(32))
            public = own[0].public, own[1].public
            statement = advertisement_statement(self._digests[index], number, *public)
            yield KeyEntry(number, *public, signer.sign(statement))

    def _sealed(self, world: World, receiver: int, keys: Keys, sharers: int) -> Iterator[bytes]:
        config, digest = self._configs[keys.config], self._digests[keys.config]
        transcript = Transcript(config, digest, self._listed(world, keys, keys.config))
        for sender in numbers(sharers):
            entry = next((each for each in keys.entries if each.device == sender), None)
            if sender == receiver or sender not in transcript.keys:
                continue
            if entry is not None and any(each.keys == keys for each in world[sender].sessions):
                receivers = [other for other in sorted(transcript.keys) if other != sender]
                yield self._dealt[entry, keys][receivers.index(receiver)]
                continue
            if entry is not None:
                yield bytes(ENCRYPTED_SHARE_BYTES)
                continue
            shared = self._share_key(sender, keys.config)(transcript.keys[receiver].share_key)
            key = transcript.sealing_key(shared, sender, receiver)
            yield seal(key, bytes(64), transcript.associated_data(sender, receiver))

    def _quorum(self, world: World, number: int, at: int) -> bytes:
        """Returns all votes that the server has for the sets that the device signed, and forged ones up to a quorum."""
        own = world[number].sessions[at]
        digest, config = self._digests[own.config], self._configs[own.config]
        if own.keys is None or not own.votes:
            return encode(QuorumMessage(digest, (0,), bytes(SIGNATURE_BYTES)))
        transcript = Transcript(config, digest, self._listed(world, own.keys, own.config))
        statement = transcript.vote_statement(numbers(own.sharers), numbers(own.votes[-1]))
        there = voters(world, own.keys, own.sharers, own.votes[-1])
        sent = list(numbers(there))
        sent += list(numbers(own.votes[-1] & ~there))[: max(0, config.quorum - len(sent))]
        signatures = {}
        for voter in sorted(sent):
            colludes = voter >= len(world)
            vote = voter, own.keys, own.sharers, own.votes[-1]
            honest = not colludes and there >> voter & 1
            signatures[voter] = (
                self._votes[vote] if honest else self._identities[voter if colludes else -1].sign(statement)
            )
        return encode(QuorumMessage(digest, tuple(signatures), b"".join(signatures.values())))

    def _session(self, number: int, name: str, log: Log) -> ClientSession:
        identity = self._identities[number]
        return ClientSession(_name(number), identity, self._roster, Policy(), log, Stream(name))

    def _share_key(self, number: int, index: int) -> Agreement:
        return Agreement(Stream(f"share {number} {index}")(32))

    def _config(self, index: int) -> RoundConfig:
        config: Config = self.scenario.configs[index]
        cohort = tuple(Member(_name(number), 0) for number in numbers(config.cohort))
        assert len(cohort) == config.cohort.bit_length(), "a client index is a device's number"
        return RoundConfig(
            job=config.job,
            round=config.round,
            attempt=config.attempt,
            nonce=hashlib.sha256(repr((index, config)).encode()).digest(),
            base_digest=BASE,
            adapter_digest=ADAPTER,
            context=b"",
            cohort=cohort,
            tier_minimums=(3,),
            segments=(Segment("v", 1, 8, 15, (0,)),),
            degree=len(cohort) - 1,
            threshold=config.threshold,
            quorum=config.quorum,
            minimum=config.minimum,
        )


def _name(number: int) -> str:
    return f"device-{number}"
