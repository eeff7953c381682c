"""The client's side of one round: five messages in, five messages out, no sockets, no clock.

    session = ClientSession("phone-7", identity, roster, policy, log)
    reply = session.advertise(message, base_digest=..., adapter_digest=...)     # exchange 0
    reply = session.share(message)                                              # exchange 1
    reply = session.mask(message, {"lora_a": words, "weight": one_word})        # exchange 2
    reply = session.vote(message)                                               # exchange 3
    reply = session.unmask(message)                                             # exchange 4; the session is over

`EXCHANGES` is the state machine: which message is accepted in which state, and which state follows. A message that is
out of order, malformed or dishonest raises `ServerFaultError` and leaves the session as it was. All that one round
shows the server is the sum over at least the minimum of survivors, who took part, and sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, TypeVar

from fedtune.core.codec.packing import pack
from fedtune.core.errors import PeerError, ServerFaultError
from fedtune.core.secagg import shamir
from fedtune.core.secagg.client_checks import (
    check_config,
    check_enough,
    check_holdings,
    check_keys,
    check_later,
    check_votes,
    checked_update,
    index_set,
    opened_pair,
    own_index,
)
from fedtune.core.secagg.config import Policy
from fedtune.core.secagg.exchanged import (
    ENCRYPTED_SHARE_BYTES,
    MAX_CONFIG_BYTES,
    MAX_COUNTER,
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
from fedtune.core.secagg.identity import Identity, Roster, RoundLog, RoundMark
from fedtune.core.secagg.masking import Words, mask_update, reduce
from fedtune.core.secagg.primitives import KEY_BYTES, Agreement, Random, Secret, seal
from fedtune.core.secagg.transcript import (
    Transcript,
    advertisement_statement,
    commitment,
    config_digest,
    mask_agreement,
)

SharePair = tuple[Secret, Secret]
"""A share of somebody's self-mask seed b and a share of its mask-key seed σ; at most one of them is ever revealed."""


@dataclass(frozen=True)
class State:
    """Where a client is in the round; holds what it knows there and nothing more.

    In every state that has it, `index` is this client's own index in the cohort.
    """

    def secrets(self) -> Iterable[Secret]:
        return ()

    def agreed(self) -> tuple[RoundConfig, bytes] | None:
        """Returns the configuration and its digest H(cfg), once there is one."""
        return None


@dataclass(frozen=True)
class Idle(State):
    """Nothing has come yet."""


@dataclass(frozen=True)
class Advertised(State):
    """The keys are out. `self_seed` is b, `mask_seed` is σ, `share_key` the X25519 key for sharing."""

    config: RoundConfig
    digest: bytes
    self_seed: Secret
    mask_seed: Secret
    share_key: Secret
    entry: KeyEntry

    def secrets(self) -> Iterable[Secret]:
        return self.self_seed, self.mask_seed, self.share_key

    def agreed(self) -> tuple[RoundConfig, bytes]:
        return self.config, self.digest


@dataclass(frozen=True)
class _Transcribed(State):
    """The key list is known, and so all that the round's keys and statements are bound to."""

    transcript: Transcript
    index: int

    def agreed(self) -> tuple[RoundConfig, bytes]:
        return self.transcript.config, self.transcript.config_digest


@dataclass(frozen=True)
class Shared(_Transcribed):
    """The shares are out. `open_keys` decrypt the shares of others; `kept` is this client's pair of its own secrets."""

    self_seed: Secret
    mask_seed: Secret
    open_keys: dict[int, Secret]
    kept: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return self.self_seed, self.mask_seed, *self.open_keys.values(), *_flat(self.kept)


@dataclass(frozen=True)
class Masked(_Transcribed):
    """The masked input is out; only other clients' shares (and the kept pair) are left. `sharers` is U2."""

    sharers: frozenset[int]
    held: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return _flat(self.held)


@dataclass(frozen=True)
class Voted(_Transcribed):
    """The survivor set U3 is signed, and this client will never agree to another."""

    sharers: frozenset[int]
    survivors: frozenset[int]
    held: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return _flat(self.held)


@dataclass(frozen=True)
class Ended(State):
    """The shares are revealed, or the session was closed; no secret is left and nothing is accepted."""


@dataclass
class ClientSession:
    """One client in one round; a new round needs a new session.

    Attributes:
        client: this client's name in the roster.
        identity: its long-lived key.
        roster: the pinned identity keys of the fleet.
        policy: what this client insists on.
        log: the last round it served, job by job.
        random: the source of all its secrets.
    """

    client: str
    identity: Identity
    roster: Roster
    policy: Policy
    log: RoundLog
    random: Random = field(default=os.urandom, repr=False)
    state: State = field(default_factory=Idle, init=False, repr=False)

    def advertise(self, message: bytes, *, base_digest: str, adapter_digest: str) -> bytes:
        """Exchange 0: takes the configuration, gives this client's signed keys for the round.

        Args:
            base_digest, adapter_digest: of the base model and the adapter this client really holds.

        Raises:
            ServerFaultError: the configuration contradicts itself, asks for less care than the policy, invites unknown
                clients, belongs to another adapter, or is of a round that was served before.
        """
        return self._exchange(RoundConfig, message, base_digest, adapter_digest)

    def share(self, message: bytes) -> bytes:
        """Exchange 1: takes everybody's keys, gives this client's shares, each sealed for its holder.

        Raises:
            ServerFaultError: a key is not signed by its client, is repeated or is weak, this client's own entry is not
                what it sent, or too few clients are left.
        """
        return self._exchange(KeyList, message)

    def mask(self, message: bytes, update: Mapping[str, Words]) -> bytes:
        """Exchange 2: takes the shares of others, gives the masked update.

        y_i = u_i + PRG(b_i) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij)   mod 2^ℓ, on every segment, j in U2

        Args:
            update: for each segment of this client's tier, unsigned words of shape (length,), none above its limit.

        Raises:
            ServerFaultError: U2 is not a part of U1 with this client in it, is too small, or a share does not decrypt.
            UpdateError: the update does not fit the segments.
        """
        return self._exchange(Delivery, message, update)

    def vote(self, message: bytes) -> bytes:
        """Exchange 3: takes the survivor set, gives this client's signature over it.

        Raises:
            ServerFaultError: U3 is not a part of U2 with this client in it, or is too small.
        """
        return self._exchange(Survivors, message)

    def unmask(self, message: bytes) -> bytes:
        """Exchange 4: takes the votes, gives for each owner the share of b if it survived, else the share of σ.

        From here on the log refuses every further attempt at this round: were the same update summed once more without
        somebody's, the difference of the two sums would be that client's.

        Raises:
            ServerFaultError: there is no quorum of valid votes for exactly the sets that this client signed.
        """
        return self._exchange(Quorum, message)

    def close(self) -> None:
        """Ends the session wherever it is and wipes its secrets."""
        self._move(Ended())

    def _exchange(self, kind: type[Message], data: bytes, *inputs: Any) -> bytes:
        """Carries out the exchange that the table names for this state, if it is the one about this kind of message."""
        exchange = EXCHANGES.get(type(self.state))
        if exchange is None or exchange.message is not kind:
            at = type(self.state).__name__.lower()
            raise ServerFaultError(f"{kind.__name__} came out of order: this client is {at}")
        after, reply = exchange.answer(self, self.state, self._decoded(kind, data), *inputs)
        if type(after) is not exchange.after:
            raise TypeError(
                f"{kind.__name__} leads to {type(after).__name__}; the table says {exchange.after.__name__}"
            )
        self._move(after)
        return encode(reply)

    def _decoded(self, kind: type[Message], data: bytes) -> Message:
        """Returns the message, if it is of this kind and of this round."""
        agreed = self.state.agreed()
        try:
            message = decode(data, kind, size_limit(kind, agreed[0]) if agreed else MAX_CONFIG_BYTES)
        except PeerError as error:
            raise ServerFaultError(str(error)) from None
        if agreed and getattr(message, "config", None) != agreed[1]:
            raise ServerFaultError(f"{kind.__name__} belongs to another round")
        return message

    def _move(self, after: State) -> None:
        """Enters a state; secrets that are not carried over into it are wiped."""
        carried = {id(secret) for secret in after.secrets()}
        before, self.state = self.state, after
        for secret in before.secrets():
            if id(secret) not in carried:
                secret.wipe()

    def _advertise(
        self, _: Idle, config: RoundConfig, base_digest: str, adapter_digest: str
    ) -> tuple[Advertised, Advertisement]:
        check_config(config, self.policy, self.roster)
        index = own_index(config, self.client, self.identity.public, self.roster)
        check_holdings(config, base_digest, adapter_digest)
        mark = RoundMark(config.round, config.attempt)
        check_later(mark, self.log.last(config.job))
        self.log.record(config.job, mark)
        digest = config_digest(config)
        self_seed, mask_seed = (Secret(shamir.to_bytes(shamir.random_element(self.random))) for _ in range(2))
        share_key = Secret(self.random(KEY_BYTES))
        keys = Agreement(share_key.value).public, mask_agreement(mask_seed.value).public
        signature = self.identity.sign(advertisement_statement(digest, index, *keys))
        after = Advertised(config, digest, self_seed, mask_seed, share_key, KeyEntry(index, *keys, signature))
        return after, Advertisement(digest, *keys, signature)

    def _share(self, state: Advertised, keys: KeyList) -> tuple[Shared, EncryptedShares]:
        check_keys(state.config, state.digest, self.roster, state.entry, keys)
        transcript, own = Transcript(state.config, state.digest, keys.entries), state.entry.client_index
        holders = sorted(transcript.holders(own))
        points = [holder + 1 for holder in holders]
        dealt = [
            shamir.split(shamir.to_element(seed.value), state.config.threshold, points, self.random)
            for seed in (state.self_seed, state.mask_seed)
        ]
        agree = Agreement(state.share_key.value)
        sealed: list[bytes] = []
        open_keys: dict[int, Secret] = {}
        kept: dict[int, SharePair] = {}
        for holder, of_self, of_mask in zip(holders, *dealt, strict=True):
            pair = shamir.to_bytes(of_self), shamir.to_bytes(of_mask)
            if holder == own:
                kept[own] = Secret(pair[0]), Secret(pair[1])
                continue
            shared = agree(transcript.keys[holder].share_key)
            key = transcript.sealing_key(shared, sender=own, receiver=holder)
            sealed.append(seal(key, b"".join(pair), transcript.associated_data(own, holder)))
            open_keys[holder] = Secret(transcript.sealing_key(shared, sender=holder, receiver=own))
        bound = commitment(state.self_seed.value, state.digest, own)
        after = Shared(transcript, own, state.self_seed, state.mask_seed, open_keys, kept)
        return after, EncryptedShares(state.digest, bound, b"".join(sealed))

    def _mask(self, state: Shared, delivery: Delivery, update: Mapping[str, Words]) -> tuple[Masked, MaskedInput]:
        transcript, own = state.transcript, state.index
        config = transcript.config
        sharers = index_set(delivery.sharers, transcript.keys.keys(), own, "sharers")
        check_enough(config, sharers, "sharers")
        senders = sorted(transcript.holders(own) & sharers - {own})
        if len(delivery.encrypted_shares) != ENCRYPTED_SHARE_BYTES * len(senders):
            expected = f"{ENCRYPTED_SHARE_BYTES} from each of {len(senders)}"
            raise ServerFaultError(f"encrypted shares: {len(delivery.encrypted_shares)} bytes, expected {expected}")
        held = dict(state.kept)
        for sender, sealed in zip(senders, pieces(delivery.encrypted_shares, ENCRYPTED_SHARE_BYTES), strict=True):
            of_self, of_mask = opened_pair(transcript, state.open_keys[sender].value, sender, own, sealed)
            held[sender] = Secret(of_self), Secret(of_mask)
        words = checked_update(config, own, update)
        mask_update(words, transcript, own, sharers, (state.self_seed.value, state.mask_seed.value))
        widths = {segment: config.segments[segment].bits for segment in words}
        packed = tuple(pack(reduce(masked, widths[segment]), widths[segment]) for segment, masked in words.items())
        return Masked(transcript, own, sharers, held), MaskedInput(transcript.config_digest, packed)

    def _vote(self, state: Masked, announced: Survivors) -> tuple[Voted, Vote]:
        transcript = state.transcript
        survivors = index_set(announced.survivors, state.sharers, state.index, "survivors")
        check_enough(transcript.config, survivors, "survivors")
        signature = self.identity.sign(transcript.vote_statement(state.sharers, survivors))
        after = Voted(transcript, state.index, state.sharers, survivors, state.held)
        return after, Vote(transcript.config_digest, signature)

    def _unmask(self, state: Voted, quorum: Quorum) -> tuple[Ended, Reveal]:
        config = state.transcript.config
        check_votes(state.transcript, self.roster, state.sharers, state.survivors, quorum)
        revealed = [
            (of_self if owner in state.survivors else of_mask).value
            for owner, (of_self, of_mask) in sorted(state.held.items())
        ]
        self.log.record(config.job, RoundMark(config.round, MAX_COUNTER))
        return Ended(), Reveal(state.transcript.config_digest, b"".join(revealed))


S = TypeVar("S", bound=State)
M = TypeVar("M", bound=Message)
T = TypeVar("T", bound=State)


@dataclass(frozen=True)
class Exchange(Generic[S, M, T]):
    """One row of the state machine.

    Attributes:
        state: where it is carried out.
        message: the kind that it takes; every other is out of order there.
        answer: checks the message and gives the state after it and the reply, or raises and changes nothing.
        after: the state that follows.
    """

    state: type[S]
    message: type[M]
    answer: Callable[Concatenate[ClientSession, S, M, ...], tuple[T, Message]]
    after: type[T]


EXCHANGES: Mapping[type[State], Exchange[Any, Any, Any]] = {
    exchange.state: exchange
    for exchange in (
        Exchange(Idle, RoundConfig, ClientSession._advertise, Advertised),
        Exchange(Advertised, KeyList, ClientSession._share, Shared),
        Exchange(Shared, Delivery, ClientSession._mask, Masked),
        Exchange(Masked, Survivors, ClientSession._vote, Voted),
        Exchange(Voted, Quorum, ClientSession._unmask, Ended),
    )
}
"""What a client accepts where; in a state without a row, `Ended`, it accepts nothing."""


def _flat(pairs: Mapping[int, SharePair]) -> list[Secret]:
    return [secret for pair in pairs.values() for secret in pair]
