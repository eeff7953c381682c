"""The client's side of one secure round: five messages in, five messages out, without sockets or a clock.

    session = ClientSession("phone-7", identity, roster, policy, log)
    reply = session.advertise(message, base_digest=..., adapter_digest=...)     # exchange 0
    reply = session.share(message)                                              # exchange 1
    reply = session.mask(message, {"lora_a": words, "weight": one_word})        # exchange 2
    reply = session.vote(message)                                               # exchange 3
    reply = session.unmask(message)                                             # exchange 4; the session is over

`EXCHANGES` is the state machine: it lists the message that each state accepts, and the state that follows. A message
that is out of order, malformed or dishonest raises `ServerFaultError` and does not change the session. From one round
the server learns only the sum over at least the minimum of survivors, the participants, and sizes.
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
    check_apart,
    check_budget,
    check_config,
    check_enough,
    check_holdings,
    check_keys,
    check_unserved,
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
from fedtune.core.secagg.identity import Identity, Roster
from fedtune.core.secagg.masking import Words, mask_update, reduce
from fedtune.core.secagg.primitives import KEY_BYTES, Agreement, Random, Secret, seal
from fedtune.core.secagg.round_log import RoundLog, RoundMark
from fedtune.core.secagg.transcript import (
    Transcript,
    advertisement_statement,
    commitment,
    config_digest,
    mask_agreement,
)

SharePair = tuple[Secret, Secret]
"""A share of a client's self-mask seed b and a share of its mask-key seed σ; at most one of them is ever revealed."""


@dataclass(frozen=True)
class State:
    """The state of a client in the round, with only the values that it still needs.

    In every state that has it, `index` is this client's own index in the cohort.
    """

    def secrets(self) -> Iterable[Secret]:
        return ()

    def agreed(self) -> tuple[RoundConfig, bytes] | None:
        """Returns the configuration and its digest H(cfg), once there is one."""
        return None


@dataclass(frozen=True)
class Idle(State):
    """The client has received no message yet."""


@dataclass(frozen=True)
class Advertised(State):
    """The client has sent its keys. `self_seed` is b, `mask_seed` is σ, `share_key` is the X25519 key for sharing."""

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
    """The client knows the key list, and so the transcript to which all keys and statements of the round are bound."""

    transcript: Transcript
    index: int

    def agreed(self) -> tuple[RoundConfig, bytes]:
        return self.transcript.config, self.transcript.config_digest


@dataclass(frozen=True)
class Shared(_Transcribed):
    """The client has sent its shares. `open_keys` decrypt others' shares; `kept` is the client's own pair."""

    self_seed: Secret
    mask_seed: Secret
    open_keys: dict[int, Secret]
    kept: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return self.self_seed, self.mask_seed, *self.open_keys.values(), *_flat(self.kept)


@dataclass(frozen=True)
class Masked(_Transcribed):
    """The client has sent its masked update; it keeps only other clients' shares and its own pair. `sharers` is U2."""

    sharers: frozenset[int]
    held: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return _flat(self.held)


@dataclass(frozen=True)
class Voted(_Transcribed):
    """The client has signed the survivor set U3, and will never agree to another."""

    sharers: frozenset[int]
    survivors: frozenset[int]
    held: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return _flat(self.held)


@dataclass(frozen=True)
class Ended(State):
    """The client has revealed its shares, or the session was closed; no secret is left and no message is accepted."""


@dataclass
class ClientSession:
    """The session of one client in one round; a new round needs a new session.

    Attributes:
        client: name of this client in the roster.
        identity: long-lived key of this client.
        roster: pinned identity keys of the fleet.
        policy: requirements of this client.
        log: what this client has served, by job.
        random: source of all its secrets.
    """

    client: str
    identity: Identity
    roster: Roster
    policy: Policy
    log: RoundLog
    random: Random = field(default=os.urandom, repr=False)
    state: State = field(default_factory=Idle, init=False, repr=False)

    def advertise(self, message: bytes, *, base_digest: str, adapter_digest: str) -> bytes:
        """Takes the configuration and returns this client's signed keys for the round (exchange 0).

        Args:
            base_digest, adapter_digest: digests of the base model and the adapter that this client really holds.

        Raises:
            ServerFaultError: the configuration contradicts itself, invites unknown clients, belongs to another
                adapter, or is of a round that was served before.
            PolicyError: it is weaker than the policy, or the client has been in as many sums as that allows.
        """
        return self._exchange(RoundConfig, message, base_digest, adapter_digest)

    def share(self, message: bytes) -> bytes:
        """Takes all clients' keys and returns this client's shares, each encrypted for its holder (exchange 1).

        Raises:
            ServerFaultError: a key is not signed by its client, is repeated or is weak, this client's own entry differs
                from the keys that it sent, or too few clients are left.
        """
        return self._exchange(KeyList, message)

    def mask(self, message: bytes, update: Mapping[str, Words]) -> bytes:
        """Takes the shares of others and returns the masked update (exchange 2).

        y_i = u_i + PRG(b_i) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij)   mod 2^ℓ, on every segment, j in U2

        The log closes the round before the masked update leaves: every further attempt at it, which would ask for the
        same update, is refused. If two sums had an update in common, their difference would be of fewer clients.

        Args:
            update: for each segment of this client's tier, unsigned words of shape (length,), none above its limit.

        Raises:
            ServerFaultError: U2 is not a subset of U1 that contains this client, is too small, or a share does not
                decrypt.
            UpdateError: the update does not fit the segments.
        """
        return self._exchange(Delivery, message, update)

    def vote(self, message: bytes) -> bytes:
        """Takes the survivor set and returns this client's signature over it (exchange 3).

        Raises:
            ServerFaultError: U3 is not a subset of U2 that contains this client, too small, or nearly an earlier one.
        """
        return self._exchange(Survivors, message)

    def unmask(self, message: bytes) -> bytes:
        """Takes the votes; returns for each owner the share of b if it survived, else the share of σ (exchange 4).

        Raises:
            ServerFaultError: there is no quorum of valid votes for exactly the sets that this client signed.
        """
        return self._exchange(Quorum, message)

    def close(self) -> None:
        """Ends the session in any state and wipes its secrets."""
        self._move(Ended())

    def _exchange(self, kind: type[Message], data: bytes, *inputs: Any) -> bytes:
        """Carries out the exchange that the table lists for this state, if it takes this kind of message."""
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
        """Decodes a message, which must be of this kind and of this round."""
        agreed = self.state.agreed()
        try:
            message = decode(data, kind, size_limit(kind, agreed[0]) if agreed else MAX_CONFIG_BYTES)
        except PeerError as error:
            raise ServerFaultError(str(error)) from None
        if agreed and getattr(message, "config", None) != agreed[1]:
            raise ServerFaultError(f"{kind.__name__} belongs to another round")
        return message

    def _move(self, after: State) -> None:
        """Enters a state, and wipes secrets that it does not keep."""
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
        served = self.log.of(config.job)
        check_unserved(mark, served, self.policy)
        check_budget(self.log.rho, self.policy)
        self.log.record(config.job, served.opened(mark))
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
        self.log.record(config.job, self.log.of(config.job).masked(config.round, self.policy.rho))
        return Masked(transcript, own, sharers, held), MaskedInput(transcript.config_digest, packed)

    def _vote(self, state: Masked, announced: Survivors) -> tuple[Voted, Vote]:
        transcript = state.transcript
        survivors = index_set(announced.survivors, state.sharers, state.index, "survivors")
        check_enough(transcript.config, survivors, "survivors")
        served = self.log.of(transcript.config.job)
        names = frozenset(transcript.config.cohort[survivor].client for survivor in survivors)
        check_apart(names, served.survivors, self.policy)
        signature = self.identity.sign(transcript.vote_statement(state.sharers, survivors))
        after = Voted(transcript, state.index, state.sharers, survivors, state.held)
        self.log.record(transcript.config.job, served.voted(names, keep=self.policy.min_difference > 0))
        return after, Vote(transcript.config_digest, signature)

    def _unmask(self, state: Voted, quorum: Quorum) -> tuple[Ended, Reveal]:
        check_votes(state.transcript, self.roster, state.sharers, state.survivors, quorum)
        revealed = [
            (of_self if owner in state.survivors else of_mask).value
            for owner, (of_self, of_mask) in sorted(state.held.items())
        ]
        return Ended(), Reveal(state.transcript.config_digest, b"".join(revealed))


S = TypeVar("S", bound=State)
M = TypeVar("M", bound=Message)
T = TypeVar("T", bound=State)


@dataclass(frozen=True)
class Exchange(Generic[S, M, T]):
    """One row of the state machine.

    Attributes:
        state: state in which it is carried out.
        message: kind of message that it takes; every other kind is out of order there.
        answer: checks the message and returns the next state and the reply, or raises and changes nothing.
        after: state that follows.
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
"""The client's state machine; in a state without a row, `Ended`, it accepts no message."""


def _flat(pairs: Mapping[int, SharePair]) -> list[Secret]:
    return [secret for pair in pairs.values() for secret in pair]
