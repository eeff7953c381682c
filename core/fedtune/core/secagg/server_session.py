"""The server's side of one secure round: it relays messages, adds up masked updates and unmasks the sum.

    session = ServerSession(config, roster)
    requests = session.open()                       # client -> message
    while requests:
        for client, reply in ask(requests):         # the clients that answer in time
            session.receive(client, reply)          # raises ClientFaultError: that client counts as silent
        requests = session.advance()                # raises RoundAbortedError: go on with a new round
    result = session.result

It uses no sockets and no clock. `EXCHANGES` is the state machine: it lists the message that each stage accepts, and the
stage that follows. The caller decides when an exchange is over; a client that has not answered by then has dropped out.
The caller must authenticate the sender of each reply, for example by Flower's node identity over TLS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.packing import packed_size, unpack
from fedtune.core.errors import ClientFaultError, JobError, PeerError, RoundAbortedError, UnfitSharesError
from fedtune.core.secagg import shamir
from fedtune.core.secagg.config import carriers, config_problems, segments_of, shortfall
from fedtune.core.secagg.exchanged import (
    ENCRYPTED_SHARE_BYTES,
    Advertisement,
    Delivery,
    EncryptedShares,
    KeyEntry,
    KeyList,
    MaskedInput,
    Message,
    Quorum,
    Reveal,
    RoundConfig,
    Survivors,
    Vote,
    decode,
    encode,
    pieces,
    size_limit,
)
from fedtune.core.secagg.identity import Roster
from fedtune.core.secagg.masking import Words, reduce, unmask_sums, word_type
from fedtune.core.secagg.primitives import is_weak
from fedtune.core.secagg.transcript import (
    Transcript,
    advertisement_statement,
    commitment,
    config_digest,
    mask_agreement,
)


class Stage(Enum):
    """The exchange in which the server is."""

    NEW = "new"
    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "masked input"
    VOTE = "consistency"
    UNMASK = "unmask"
    DONE = "done"
    ABORTED = "aborted"


@dataclass(frozen=True)
class OpenedSum:
    """The outcome of a round.

    Attributes:
        sums: for each segment, the sum of the survivors' words modulo 2^ℓ, uint32 up to 32 bits, else uint64.
        contributors: for each segment, the number of clients in its sum.
        survivors: clients whose update is in the sum.
        dropouts: other invited clients.
        liars: survivors that revealed a wrong share; the sum is correct in spite of them.
    """

    sums: Mapping[str, NDArray[np.uint32] | NDArray[np.uint64]]
    contributors: Mapping[str, int]
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    liars: tuple[str, ...]


class ServerSession:
    """The session of the server in one round; a new round needs a new session.

    Raises:
        JobError: the configuration contradicts itself.
    """

    def __init__(self, config: RoundConfig, roster: Roster) -> None:
        found = config_problems(config)
        if found:
            raise JobError(found)
        self.config = config
        self.stage = Stage.NEW
        self._roster = roster
        self._digest = config_digest(config)
        self._indices = {member.client: index for index, member in enumerate(config.cohort)}
        self._asked: frozenset[int] = frozenset()
        self._answered: set[int] = set()
        self._entries: dict[int, KeyEntry] = {}
        self._keys_in_use: set[bytes] = set()
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._commitments: dict[int, bytes] = {}
        self._sums: dict[int, Words] = {}
        self._votes: dict[int, bytes] = {}
        self._revealed: dict[int, dict[int, int]] = {}
        self._transcript: Transcript | None = None
        self._sharers: frozenset[int] = frozenset()
        self._survivors: frozenset[int] = frozenset()
        self._result: OpenedSum | None = None

    def open(self) -> dict[str, bytes]:
        """Starts the round; returns the configuration for each invited client."""
        if self.stage is not Stage.NEW:
            raise RoundAbortedError(f"this session is at {self.stage.value}: a round is opened once")
        return self._enter(Stage.ADVERTISE, self._to(range(len(self.config.cohort)), self.config))

    @property
    def result(self) -> OpenedSum:
        """The outcome, once the last exchange is over."""
        if self._result is None:
            raise RoundAbortedError(f"there is no sum at {self.stage.value}")
        return self._result

    @property
    def reply_limit(self) -> int:
        """The bytes beyond which an answer in the current exchange cannot be honest."""
        return size_limit(EXCHANGES[self.stage].message, self.config)

    def receive(self, client: str, reply: bytes) -> None:
        """Takes one client's answer in the current exchange.

        Raises:
            ClientFaultError: this client is not asked now, has answered already, or its answer is invalid; the session
                is unchanged.
        """
        exchange, index = EXCHANGES.get(self.stage), self._indices.get(client)
        if exchange is None or index is None or index not in self._asked:
            raise ClientFaultError(client, f"nothing is asked of it at {self.stage.value}")
        if index in self._answered:
            raise ClientFaultError(client, f"it has answered already at {self.stage.value}")
        try:
            message = decode(reply, exchange.message, self.reply_limit)
        except PeerError as error:
            raise ClientFaultError(client, str(error)) from None
        if getattr(message, "config", None) != self._digest:
            raise ClientFaultError(client, "its answer belongs to another round")
        problem = exchange.take(self, index, message)
        if problem:
            raise ClientFaultError(client, problem)
        self._answered.add(index)

    def advance(self) -> dict[str, bytes]:
        """Ends the current exchange and starts the next one with the clients that answered.

        Returns:
            The next request for each remaining client; empty when the sum is complete.

        Raises:
            RoundAbortedError: too few clients are left, or their shares do not recover the secrets. The session is
                over.
        """
        exchange = EXCHANGES.get(self.stage)
        if exchange is None:
            raise RoundAbortedError(f"there is nothing to end at {self.stage.value}")
        try:
            requests = exchange.close(self)
        except RoundAbortedError:
            self._enter(Stage.ABORTED, {})
            raise
        return self._enter(exchange.after, requests)

    # Exchange 0: keys

    def _take_keys(self, sender: int, message: Advertisement) -> str | None:
        statement = advertisement_statement(self._digest, sender, message.share_key, message.mask_key)
        if not self._roster.verify(self._name(sender), statement, message.signature):
            return "its keys are not signed by its pinned identity"
        keys = {message.share_key, message.mask_key}
        if len(keys) < 2 or keys & self._keys_in_use:
            return "a key of it is in use already"
        if any(is_weak(key) for key in keys):
            return "a key of it is weak"
        self._keys_in_use |= keys
        self._entries[sender] = KeyEntry(sender, message.share_key, message.mask_key, message.signature)
        return None

    def _close_keys(self) -> dict[int, bytes]:
        self._require_enough(self._entries, "advertised")
        entries = tuple(self._entries[index] for index in sorted(self._entries))
        self._transcript = Transcript(self.config, self._digest, entries)
        return self._to(self._entries, KeyList(self._digest, entries))

    # Exchange 1: shares

    def _take_sealed(self, sender: int, message: EncryptedShares) -> str | None:
        receivers = sorted(self._agreed.holders(sender) - {sender})
        if len(message.encrypted_shares) != ENCRYPTED_SHARE_BYTES * len(receivers):
            expected = f"expected {ENCRYPTED_SHARE_BYTES} for each of {len(receivers)} holders"
            return f"{len(message.encrypted_shares)} bytes of encrypted shares, {expected}"
        sealed = pieces(message.encrypted_shares, ENCRYPTED_SHARE_BYTES)
        self._sealed[sender] = dict(zip(receivers, sealed, strict=True))
        self._commitments[sender] = message.commitment
        return None

    def _close_sealed(self) -> dict[int, bytes]:
        self._require_enough(self._sealed, "shared")
        self._sharers = frozenset(self._sealed)
        self._require_holders(self._sharers, self._sharers, "shared")
        for index, segment in enumerate(self.config.segments):
            self._sums[index] = np.zeros(segment.length, dtype=word_type(segment.bits))
        listed = tuple(sorted(self._sharers))
        requests: dict[int, bytes] = {}
        for receiver in listed:
            senders = sorted(self._agreed.holders(receiver) & self._sharers - {receiver})
            sealed = b"".join(self._sealed[sender][receiver] for sender in senders)
            requests[receiver] = encode(Delivery(self._digest, listed, sealed))
        self._sealed = {}
        return requests

    # Exchange 2: masked inputs

    def _take_masked(self, sender: int, message: MaskedInput) -> str | None:
        indices = segments_of(self.config, sender)
        if len(message.segments) != len(indices):
            return f"{len(message.segments)} segments, expected {len(indices)}"
        segments = [self.config.segments[index] for index in indices]
        for segment, data in zip(segments, message.segments, strict=True):
            size = packed_size(segment.length, segment.bits)
            if len(data) != size:
                return f"segment {segment.name}: {len(data)} bytes, expected {size}"
        try:
            words = [
                unpack(data, segment.bits, segment.length)
                for segment, data in zip(segments, message.segments, strict=True)
            ]
        except PeerError as error:
            return str(error)
        for index, masked in zip(indices, words, strict=True):
            self._sums[index] += masked.astype(self._sums[index].dtype)
        return None

    def _close_masked(self) -> dict[int, bytes]:
        self._require_enough(self._answered, "sent a masked input")
        self._survivors = frozenset(self._answered)
        return self._to(self._survivors, Survivors(self._digest, tuple(sorted(self._survivors))))

    # Exchange 3: votes

    def _take_vote(self, voter: int, message: Vote) -> str | None:
        statement = self._agreed.vote_statement(self._sharers, self._survivors)
        if not self._roster.verify(self._name(voter), statement, message.signature):
            return "its vote is not for these survivors, or not signed by its pinned identity"
        self._votes[voter] = message.signature
        return None

    def _close_votes(self) -> dict[int, bytes]:
        if len(self._votes) < self.config.quorum:
            raise RoundAbortedError(f"{len(self._votes)} clients voted, expected at least {self.config.quorum}")
        self._require_holders(self._sharers, self._votes, "voted")
        shown = tuple(sorted(self._votes))[: self.config.quorum]
        signatures = b"".join(self._votes[voter] for voter in shown)
        return self._to(self._votes, Quorum(self._digest, shown, signatures))

    # Exchange 4: unmask

    def _take_shares(self, holder: int, message: Reveal) -> str | None:
        owners = sorted(self._agreed.holders(holder) & self._sharers)
        if len(message.shares) != shamir.ELEMENT_BYTES * len(owners):
            return f"{len(message.shares)} bytes of shares, expected {shamir.ELEMENT_BYTES} for each of {len(owners)}"
        try:
            shares = [shamir.to_element(share) for share in pieces(message.shares, shamir.ELEMENT_BYTES)]
        except ValueError:
            return "a share is not an element of the field"
        self._revealed[holder] = dict(zip(owners, shares, strict=True))
        return None

    def _close_shares(self) -> dict[int, bytes]:
        self._require_holders(self._sharers, self._revealed, "revealed their shares")
        seeds, liars = self._recover()
        unmask_sums(self._sums, self._agreed, self._survivors, seeds)
        segments, survivors = self.config.segments, self._survivors
        self._result = OpenedSum(
            sums={segment.name: reduce(self._sums[index], segment.bits) for index, segment in enumerate(segments)},
            contributors={segment.name: len(carriers(self.config, segment) & survivors) for segment in segments},
            survivors=self._names(survivors),
            dropouts=self._names(set(range(len(self.config.cohort))) - survivors),
            liars=self._names(liars),
        )
        return {}

    def _recover(self) -> tuple[dict[int, bytes], set[int]]:
        """Recovers and checks the secrets, b of a survivor or σ of a dropout; also returns senders of wrong shares."""
        threshold = self.config.threshold
        combiners: dict[tuple[int, ...], shamir.Combiner] = {}
        seeds: dict[int, bytes] = {}
        liars: set[int] = set()
        for owner in sorted(self._sharers):
            # Holders of wrong shares come last in later recoveries, so that each of them is corrected once.
            holders = sorted(self._revealed, key=lambda holder: (holder in liars, holder))
            shares = {
                holder + 1: self._revealed[holder][owner] for holder in holders if owner in self._revealed[holder]
            }
            points = tuple(shares)[:threshold]
            if points not in combiners:
                combiners[points] = shamir.Combiner(points)
            seed = shamir.to_bytes(combiners[points].combine([shares[point] for point in points]))
            if not self._is_seed_of(owner, seed):
                corrected = shamir.correct(list(shares), list(shares.values()), threshold)
                seed = shamir.to_bytes(corrected.secret) if corrected else b""
                if corrected is None or not self._is_seed_of(owner, seed):
                    raise UnfitSharesError(f"the shares of {self._name(owner)} do not fit together")
                liars |= {point - 1 for point in corrected.wrong}
            seeds[owner] = seed
        return seeds, liars

    def _is_seed_of(self, owner: int, seed: bytes) -> bool:
        if owner in self._survivors:
            return commitment(seed, self._digest, owner) == self._commitments[owner]
        return mask_agreement(seed).public == self._agreed.keys[owner].mask_key

    # Used by all exchanges

    @property
    def _agreed(self) -> Transcript:
        assert self._transcript is not None, "set when the keys are closed, before any stage that needs it"
        return self._transcript

    def _name(self, index: int) -> str:
        return self.config.cohort[index].client

    def _names(self, indices: Iterable[int]) -> tuple[str, ...]:
        return tuple(self._name(index) for index in sorted(indices))

    def _to(self, indices: Iterable[int], message: Message) -> dict[int, bytes]:
        """Returns one message for each of these clients."""
        return dict.fromkeys(sorted(indices), encode(message))

    def _enter(self, stage: Stage, requests: Mapping[int, bytes]) -> dict[str, bytes]:
        """Enters a stage in which these clients are asked, and returns their requests by name.

        If no client is asked the round is over, and all values that could unmask a sum are deleted.
        """
        self.stage = stage
        self._asked, self._answered = frozenset(requests), set()
        if not requests:
            self._sealed, self._commitments, self._sums, self._revealed = {}, {}, {}, {}
        return {self._name(index): request for index, request in requests.items()}

    def _require_enough(self, present: Iterable[int], what: str) -> None:
        missing = shortfall(self.config, present)
        if missing:
            raise RoundAbortedError(f"too few clients {what}: {missing}")

    def _require_holders(self, owners: Iterable[int], present: Iterable[int], what: str) -> None:
        """Checks that the clients present can recover every owner's secrets."""
        here = frozenset(present)
        for owner in sorted(owners):
            left = len(self._agreed.holders(owner) & here)
            if left < self.config.threshold:
                raise RoundAbortedError(
                    f"too few clients {what}: {left} hold shares of {self._name(owner)}, "
                    f"expected at least {self.config.threshold}"
                )


@dataclass(frozen=True)
class Exchange:
    """One row of the server's state machine.

    Attributes:
        message: kind of message that it takes.
        take: checks a message and keeps its content; returns the problem, and keeps nothing, if there is one.
        close: ends the exchange with the clients that answered; returns the next requests by client index, or raises.
        after: stage that follows.
    """

    message: type[Message]
    take: Callable[[ServerSession, int, Any], str | None]
    close: Callable[[ServerSession], dict[int, bytes]]
    after: Stage


EXCHANGES: Mapping[Stage, Exchange] = {
    Stage.ADVERTISE: Exchange(Advertisement, ServerSession._take_keys, ServerSession._close_keys, Stage.SHARE),
    Stage.SHARE: Exchange(EncryptedShares, ServerSession._take_sealed, ServerSession._close_sealed, Stage.MASK),
    Stage.MASK: Exchange(MaskedInput, ServerSession._take_masked, ServerSession._close_masked, Stage.VOTE),
    Stage.VOTE: Exchange(Vote, ServerSession._take_vote, ServerSession._close_votes, Stage.UNMASK),
    Stage.UNMASK: Exchange(Reveal, ServerSession._take_shares, ServerSession._close_shares, Stage.DONE),
}
"""The server's state machine; at a stage without a row it accepts no message."""
