"""The client's side of one round: five messages in, five messages out, no sockets, no clock.

    session = ClientSession("phone-7", identity, roster, policy, log)
    reply = session.advertise(message, base_digest=..., adapter_digest=...)     # exchange 0
    reply = session.share(message)                                              # exchange 1
    reply = session.mask(message, {"lora_a": words, "weight": one_word})        # exchange 2
    reply = session.vote(message)                                               # exchange 3
    reply = session.unmask(message)                                             # exchange 4; the session is over

A message that is out of order, malformed or dishonest raises `ServerFaultError` and leaves the session as it was. What
one round shows the server: the sum over at least the minimum of survivors, who took part, and sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fedtune.core.codec.packing import pack
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.secagg import shamir
from fedtune.core.secagg.config import Policy, config_problems, policy_problems, segments_of, shortfall
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
    increasing,
    pieces,
    size_limit,
)
from fedtune.core.secagg.identity import Identity, Roster, RoundLog, RoundMark
from fedtune.core.secagg.masking import mask_update
from fedtune.core.secagg.masks import Words, reduce, word_type
from fedtune.core.secagg.primitives import KEY_BYTES, SIGNATURE_BYTES, Agreement, Random, Secret, is_weak, seal, unseal
from fedtune.core.secagg.session_errors import ServerFaultError
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
    """Where a client is in the round; holds what it knows there and nothing more."""

    def secrets(self) -> Iterable[Secret]:
        return ()


@dataclass(frozen=True)
class Idle(State):
    """Nothing has come yet."""


@dataclass(frozen=True)
class Advertised(State):
    """The keys are out. `self_seed` is b, `mask_seed` is σ, `share_key` the X25519 key for sharing."""

    config: RoundConfig
    digest: bytes
    client_index: int
    self_seed: Secret
    mask_seed: Secret
    share_key: Secret
    entry: KeyEntry

    def secrets(self) -> Iterable[Secret]:
        return self.self_seed, self.mask_seed, self.share_key


@dataclass(frozen=True)
class Shared(State):
    """The shares are out. `open_keys` decrypt the shares of others; `kept` is this client's pair of its own secrets."""

    transcript: Transcript
    client_index: int
    self_seed: Secret
    mask_seed: Secret
    open_keys: dict[int, Secret]
    kept: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return self.self_seed, self.mask_seed, *self.open_keys.values(), *_flat(self.kept)


@dataclass(frozen=True)
class Masked(State):
    """The masked input is out; only other clients' shares (and the kept pair) are left. `sharers` is U2."""

    transcript: Transcript
    client_index: int
    sharers: frozenset[int]
    held: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return _flat(self.held)


@dataclass(frozen=True)
class Voted(State):
    """The survivor set U3 is signed, and this client will never agree to another."""

    transcript: Transcript
    client_index: int
    sharers: frozenset[int]
    survivors: frozenset[int]
    held: dict[int, SharePair]

    def secrets(self) -> Iterable[Secret]:
        return _flat(self.held)


@dataclass(frozen=True)
class Ended(State):
    """The shares are revealed, or the session was closed; no secret is left and nothing is accepted."""


EXCHANGES: Mapping[type[State], tuple[type[Message], type[State]]] = {
    Idle: (RoundConfig, Advertised),
    Advertised: (KeyList, Shared),
    Shared: (Delivery, Masked),
    Masked: (Survivors, Voted),
    Voted: (Quorum, Ended),
}
"""In which state which message is taken, and the state after it. Everything else is refused."""

S = TypeVar("S", bound=State)
M = TypeVar("M", bound=Message)


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
        _, config = self._take(Idle, RoundConfig, message)
        client_index = self._check_config(config, base_digest, adapter_digest)
        digest = config_digest(config)
        self.log.record(config.job, RoundMark(config.round, config.attempt))
        self_seed, mask_seed = (Secret(shamir.to_bytes(shamir.random_element(self.random))) for _ in range(2))
        share_key = Secret(self.random(KEY_BYTES))
        keys = Agreement(share_key.value).public, mask_agreement(mask_seed.value).public
        signature = self.identity.sign(advertisement_statement(digest, client_index, *keys))
        entry = KeyEntry(client_index, *keys, signature)
        self._move(Advertised(config, digest, client_index, self_seed, mask_seed, share_key, entry))
        return encode(Advertisement(digest, *keys, signature))

    def share(self, message: bytes) -> bytes:
        """Exchange 1: takes everybody's keys, gives this client's shares, each sealed for its holder.

        Raises:
            ServerFaultError: a key is not signed by its client, is repeated or is weak, this client's own entry is not
                what it sent, or too few clients are left.
        """
        state, keys = self._take(Advertised, KeyList, message)
        self._check_keys(state, keys)
        transcript = Transcript(state.config, state.digest, keys.entries)
        holders = sorted(transcript.holders(state.client_index))
        points = [holder + 1 for holder in holders]
        threshold = state.config.threshold
        dealt = [
            shamir.split(shamir.to_element(seed.value), threshold, points, self.random)
            for seed in (state.self_seed, state.mask_seed)
        ]
        agree = Agreement(state.share_key.value)
        encrypted_shares: list[bytes] = []
        open_keys: dict[int, Secret] = {}
        kept: dict[int, SharePair] = {}
        for holder, of_self, of_mask in zip(holders, *dealt, strict=True):
            pair = shamir.to_bytes(of_self), shamir.to_bytes(of_mask)
            if holder == state.client_index:
                kept[holder] = Secret(pair[0]), Secret(pair[1])
                continue
            shared = agree(transcript.keys[holder].share_key)
            seal_key = transcript.share_key_for(shared, sender=state.client_index, receiver=holder)
            encrypted_shares.append(
                seal(seal_key, b"".join(pair), transcript.share_associated(state.client_index, holder))
            )
            open_keys[holder] = Secret(transcript.share_key_for(shared, sender=holder, receiver=state.client_index))
        bound = commitment(state.self_seed.value, state.digest, state.client_index)
        self._move(Shared(transcript, state.client_index, state.self_seed, state.mask_seed, open_keys, kept))
        return encode(EncryptedShares(state.digest, bound, b"".join(encrypted_shares)))

    def mask(self, message: bytes, update: Mapping[str, Words]) -> bytes:
        """Exchange 2: takes the shares of others, gives the masked update.

        y_i = u_i + PRG(b_i) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij)   mod 2^ℓ, on every segment, j in U2

        Args:
            update: for each segment of this client's tier, unsigned words of shape (length,), none above its limit.

        Raises:
            ServerFaultError: U2 is not a part of U1 with this client in it, is too small, or a share does not decrypt.
            UpdateError: the update does not fit the segments.
        """
        state, delivery = self._take(Shared, Delivery, message)
        config, transcript, client_index = state.transcript.config, state.transcript, state.client_index
        sharers = _index_set(delivery.sharers, transcript.keys.keys(), client_index, "sharers")
        _check_enough(config, sharers, "sharers")
        senders = sorted(transcript.holders(client_index) & sharers - {client_index})
        if len(delivery.encrypted_shares) != ENCRYPTED_SHARE_BYTES * len(senders):
            expected = f"{ENCRYPTED_SHARE_BYTES} from each of {len(senders)}"
            raise ServerFaultError(f"encrypted shares: {len(delivery.encrypted_shares)} bytes, expected {expected}")
        held = dict(state.kept)
        for sender, encrypted_share in zip(
            senders, pieces(delivery.encrypted_shares, ENCRYPTED_SHARE_BYTES), strict=True
        ):
            held[sender] = _open(state, sender, encrypted_share)
        words = _checked_update(config, client_index, update)
        mask_update(words, transcript, client_index, sharers, (state.self_seed.value, state.mask_seed.value))
        packed = tuple(
            pack(reduce(masked, config.segments[index].bits), config.segments[index].bits)
            for index, masked in words.items()
        )
        self._move(Masked(transcript, client_index, sharers, held))
        return encode(MaskedInput(transcript.config_digest, packed))

    def vote(self, message: bytes) -> bytes:
        """Exchange 3: takes the survivor set, gives this client's signature over it.

        Raises:
            ServerFaultError: U3 is not a part of U2 with this client in it, or is too small.
        """
        state, announced = self._take(Masked, Survivors, message)
        survivors = _index_set(announced.survivors, state.sharers, state.client_index, "survivors")
        _check_enough(state.transcript.config, survivors, "survivors")
        signature = self.identity.sign(state.transcript.vote_statement(state.sharers, survivors))
        self._move(Voted(state.transcript, state.client_index, state.sharers, survivors, state.held))
        return encode(Vote(state.transcript.config_digest, signature))

    def unmask(self, message: bytes) -> bytes:
        """Exchange 4: takes the votes, gives for each owner the share of b if it survived, else the share of σ.

        From here on the log refuses every further attempt at this round: were the same update summed once more without
        somebody's, the difference of the two sums would be that client's.

        Raises:
            ServerFaultError: there is no quorum of valid votes for exactly the sets that this client signed.
        """
        state, quorum = self._take(Voted, Quorum, message)
        self._check_votes(state, quorum)
        revealed = [
            (of_self if owner in state.survivors else of_mask).value
            for owner, (of_self, of_mask) in sorted(state.held.items())
        ]
        self.log.record(state.transcript.config.job, RoundMark(state.transcript.config.round, MAX_COUNTER))
        self._move(Ended())
        return encode(Reveal(state.transcript.config_digest, b"".join(revealed)))

    def close(self) -> None:
        """Ends the session wherever it is and wipes its secrets."""
        self._move(Ended())

    def _take(self, expected: type[S], kind: type[M], message: bytes) -> tuple[S, M]:
        """The current state and the decoded message, if both are what this exchange is about."""
        state = self.state
        if not isinstance(state, expected):
            raise ServerFaultError(f"{kind.__name__} came out of order: this client is {type(state).__name__.lower()}")
        agreed = _agreed(state)
        try:
            decoded = decode(message, kind, size_limit(kind, agreed[0]) if agreed else MAX_CONFIG_BYTES)
        except PeerError as error:
            raise ServerFaultError(str(error)) from None
        if agreed and getattr(decoded, "config", None) != agreed[1]:
            raise ServerFaultError(f"{kind.__name__} belongs to another round")
        return state, decoded

    def _move(self, after: State) -> None:
        """Enters a state; secrets that are not carried over into it are wiped."""
        carried = {id(secret) for secret in after.secrets()}
        before, self.state = self.state, after
        for secret in before.secrets():
            if id(secret) not in carried:
                secret.wipe()

    def _check_config(self, config: RoundConfig, base_digest: str, adapter_digest: str) -> int:
        """This client's client index in a configuration it can agree to."""
        found = config_problems(config) or policy_problems(config, self.policy)
        if found:
            raise ServerFaultError("configuration: " + "; ".join(found))
        strangers = [member.client for member in config.cohort if member.client not in self.roster.keys]
        if strangers:
            raise ServerFaultError(f"configuration: {strangers[0]} is not in this client's roster")
        client_indices = [
            client_index for client_index, member in enumerate(config.cohort) if member.client == self.client
        ]
        if not client_indices or self.roster.keys[self.client] != self.identity.public:
            raise ServerFaultError(f"configuration: {self.client} is not invited, or pinned under another key")
        asked, loaded = (config.base_digest, config.adapter_digest), (base_digest, adapter_digest)
        for what, theirs, ours in zip(("base", "adapter"), asked, loaded, strict=True):
            if theirs != ours:
                raise ServerFaultError(f"configuration: {what} {theirs[:12]}, this client holds {ours[:12]}")
        mark, last = RoundMark(config.round, config.attempt), self.log.last(config.job)
        if last is not None and mark <= last:
            raise ServerFaultError(f"configuration: round {mark} is not after {last}, the last one served")
        return client_indices[0]

    def _check_keys(self, state: Advertised, keys: KeyList) -> None:
        client_indices = [entry.client_index for entry in keys.entries]
        advertisers = _index_set(client_indices, range(len(state.config.cohort)), state.client_index, "keys")
        _check_enough(state.config, advertisers, "advertisers")
        if state.entry not in keys.entries:
            raise ServerFaultError("keys: this client's own entry is not what it advertised")
        if len({key for entry in keys.entries for key in (entry.share_key, entry.mask_key)}) != 2 * len(client_indices):
            raise ServerFaultError("keys: a key occurs twice")
        for entry in keys.entries:
            client = state.config.cohort[entry.client_index].client
            if is_weak(entry.share_key) or is_weak(entry.mask_key):
                raise ServerFaultError(f"keys: a key of {client} is weak")
            statement = advertisement_statement(state.digest, entry.client_index, entry.share_key, entry.mask_key)
            if not self.roster.verify(client, statement, entry.signature):
                raise ServerFaultError(f"keys: {client} did not sign the keys listed for it")

    def _check_votes(self, state: Voted, quorum: Quorum) -> None:
        config = state.transcript.config
        voters = _index_set(quorum.voters, state.survivors, None, "voters")
        if len(voters) < config.quorum:
            raise ServerFaultError(f"votes: {len(voters)}, expected at least {config.quorum}")
        if len(quorum.signatures) != SIGNATURE_BYTES * len(voters):
            raise ServerFaultError(f"votes: {len(quorum.signatures)} bytes of signatures for {len(voters)} voters")
        statement = state.transcript.vote_statement(state.sharers, state.survivors)
        for voter, signature in zip(quorum.voters, pieces(quorum.signatures, SIGNATURE_BYTES), strict=True):
            if not self.roster.verify(config.cohort[voter].client, statement, signature):
                raise ServerFaultError(f"votes: {config.cohort[voter].client} did not sign what this client signed")


def _agreed(state: State) -> tuple[RoundConfig, bytes] | None:
    """The configuration and its digest, once there is one."""
    match state:
        case Advertised(config=config, digest=digest):
            return config, digest
        case Shared(transcript=transcript) | Masked(transcript=transcript) | Voted(transcript=transcript):
            return transcript.config, transcript.config_digest
        case _:
            return None


def _flat(pairs: Mapping[int, SharePair]) -> list[Secret]:
    return [secret for pair in pairs.values() for secret in pair]


def _open(state: Shared, sender: int, encrypted_share: bytes) -> SharePair:
    """The pair in an encrypted share from `sender` to this client."""
    transcript = state.transcript
    opened = unseal(
        state.open_keys[sender].value, encrypted_share, transcript.share_associated(sender, state.client_index)
    )
    client = transcript.config.cohort[sender].client
    if opened is None:
        raise ServerFaultError(
            f"encrypted shares: the one from {client} was changed on its way or is not from it", client
        )
    pair = pieces(opened, shamir.ELEMENT_BYTES)
    try:
        for share in pair:
            shamir.to_element(share)
    except ValueError:
        raise ServerFaultError(f"encrypted shares: the one from {client} does not hold shares", client) from None
    return Secret(pair[0]), Secret(pair[1])


def _index_set(client_indices: Sequence[int], within: Iterable[int], own: int | None, what: str) -> frozenset[int]:
    """A list of client indices as a set: increasing, part of the set before it, with this client where it must be."""
    found = frozenset(client_indices)
    if not increasing(client_indices):
        raise ServerFaultError(f"{what}: client indices must be strictly increasing")
    if not found <= frozenset(within):
        raise ServerFaultError(f"{what}: a client index is listed that cannot be there")
    if own is not None and own not in found:
        raise ServerFaultError(f"{what}: this client is not among them")
    return found


def _check_enough(config: RoundConfig, client_indices: Iterable[int], what: str) -> None:
    missing = shortfall(config, client_indices)
    if missing:
        raise ServerFaultError(f"{what}: {missing}")


def _checked_update(config: RoundConfig, client_index: int, update: Mapping[str, Words]) -> dict[int, Words]:
    """A copy of the update by segment index, in machine words that masks can be added to."""
    wanted = segments_of(config, client_index)
    names = {config.segments[index].name for index in wanted}
    if names != update.keys():
        raise UpdateError(f"update has segments {sorted(update)}, the round sums {sorted(names)}")
    words: dict[int, Words] = {}
    for index in wanted:
        segment = config.segments[index]
        given = update[segment.name]
        if given.dtype.kind != "u" or given.shape != (segment.length,):
            got = f"{given.dtype} of shape {given.shape}"
            raise UpdateError(f"segment {segment.name}: expected {segment.length} unsigned words, got {got}")
        if given.size and int(given.max()) > segment.limit:
            raise UpdateError(f"segment {segment.name}: {int(given.max())} is above the limit of {segment.limit}")
        words[index] = np.array(given, dtype=word_type(segment.bits))
    return words
