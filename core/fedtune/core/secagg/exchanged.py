"""The messages of the five exchanges, as bytes and back, every size bounded.

    exchange          server to client        client to server
    0  advertise      RoundConfig             Advertisement
    1  share          KeyList                 EncryptedShares
    2  masked input   Delivery                MaskedInput
    3  consistency    Survivors               Vote
    4  unmask         Quorum                  Reveal

A message is one msgpack array, its name first. Clients are named by their *client index*, the position in the
configuration's cohort. Lists of client indices are strictly increasing, and values for each client of an agreed list
are joined without lengths. A message has one form only: bytes that would not be written again the same way are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from fedtune.core.errors import PeerError
from fedtune.core.secagg.identity import MAX_NAME
from fedtune.core.secagg.primitives import DIGEST_BYTES, KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from fedtune.core.secagg.shamir import ELEMENT_BYTES

MAX_COHORT = 10_000
MAX_SEGMENTS = 1024
MAX_TIERS = 256
MAX_LENGTH = 1 << 36
MAX_COUNTER = 1 << 53
MAX_CONTEXT = 64 << 10
ENCRYPTED_SHARE_BYTES = 2 * ELEMENT_BYTES + TAG_BYTES
MAX_CONFIG_BYTES = 8 << 20

_NAME_OVERHEAD = 64  # more than any message's name, list headers and config digest take beside what is counted
_INDEX_BYTES = 3  # msgpack takes at most this for a number below MAX_COHORT

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, pattern=r"^[^\x00-\x1f\x7f]+$")]
HexDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Counter = Annotated[int, Meta(ge=0, le=MAX_COUNTER)]
Count = Annotated[int, Meta(ge=0, le=MAX_COHORT)]
ClientIndex = Annotated[int, Meta(ge=0, lt=MAX_COHORT)]
ClientIndices = Annotated[tuple[ClientIndex, ...], Meta(max_length=MAX_COHORT)]
Index = Annotated[int, Meta(ge=0, lt=MAX_TIERS)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that travels."""


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A vector that is summed in its own ring over the clients of some tiers.

    Attributes:
        name: distinct within the round.
        length: the words of it.
        bits: ℓ, the ring is the integers modulo 2^ℓ.
        limit: the greatest word one client may contribute.
        tiers: the tiers that carry it, strictly increasing.
    """

    name: Name
    length: Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
    bits: Annotated[int, Meta(ge=1, le=62)]
    limit: Annotated[int, Meta(ge=0, lt=1 << 62)]
    tiers: Annotated[tuple[Index, ...], Meta(min_length=1, max_length=MAX_TIERS)]


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An invited client and the tier it trains in."""

    client: Name
    tier: Index


class RoundConfig(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Everything both sides must agree on; its digest is bound into every later statement.

    Attributes:
        job, round, attempt: which round; an aborted one is tried again under the next attempt.
        nonce: drawn by the server for this round.
        base_digest, adapter_digest: what the client must have loaded before it trains.
        context: the codec's public parameters (selection seed, clip, bits), opaque here.
        cohort: the invited clients; a position is a client index.
        tier_minimums: for each tier, the survivors below which the round has no sum.
        segments: what is summed.
        degree, threshold, quorum, minimum: see `graph.Thresholds`.
    """

    job: Name
    round: Counter
    attempt: Counter
    nonce: Digest
    base_digest: HexDigest
    adapter_digest: HexDigest
    context: Annotated[bytes, Meta(max_length=MAX_CONTEXT)]
    cohort: Annotated[tuple[Member, ...], Meta(min_length=2, max_length=MAX_COHORT)]
    tier_minimums: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_TIERS)]
    segments: Annotated[tuple[Segment, ...], Meta(min_length=1, max_length=MAX_SEGMENTS)]
    degree: Count
    threshold: Count
    quorum: Count
    minimum: Count


class Advertisement(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's fresh keys for this round, signed with its identity key."""

    config: Digest
    share_key: Key
    mask_key: Key
    signature: Signature


class KeyEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One client's advertisement as everybody gets to see it."""

    client_index: ClientIndex
    share_key: Key
    mask_key: Key
    signature: Signature


class KeyList(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The keys of all who advertised, by increasing client index: the set U1."""

    config: Digest
    entries: Annotated[tuple[KeyEntry, ...], Meta(max_length=MAX_COHORT)]


class EncryptedShares(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's shares, encrypted for each other holder in U1, by increasing client index, and a commitment to b."""

    config: Digest
    commitment: Digest
    encrypted_shares: Annotated[bytes, Meta(max_length=MAX_COHORT * ENCRYPTED_SHARE_BYTES)]


class Delivery(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Who has shared (the set U2), and the encrypted shares for one client from the others in U2, by client index."""

    config: Digest
    sharers: ClientIndices
    encrypted_shares: Annotated[bytes, Meta(max_length=MAX_COHORT * ENCRYPTED_SHARE_BYTES)]


class MaskedInput(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The masked vector: packed words for each segment of the client's tier, in the configuration's order."""

    config: Digest
    segments: Annotated[tuple[bytes, ...], Meta(max_length=MAX_SEGMENTS)]


class Survivors(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Whose masked input is in the sum: the set U3."""

    config: Digest
    survivors: ClientIndices


class Vote(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's signature over the configuration, the key list, U2 and U3."""

    config: Digest
    signature: Signature


class Quorum(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Enough votes for the sets that were announced, by increasing client index."""

    config: Digest
    voters: ClientIndices
    signatures: Annotated[bytes, Meta(max_length=MAX_COHORT * SIGNATURE_BYTES)]


class Reveal(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """For each owner in U2 whose shares the client holds, by client index: the b share in U3, else the σ share."""

    config: Digest
    shares: Annotated[bytes, Meta(max_length=MAX_COHORT * ELEMENT_BYTES)]


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Returns the one byte form of a message."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, expected: type[M], limit: int) -> M:
    """Reads a message of the expected kind.

    Raises:
        PeerError: longer than `limit`, not such a message, a field out of bounds, or not in the one byte form.
    """
    kind = expected.__name__
    if len(data) > limit:
        raise PeerError(f"{kind}: {len(data)} bytes, expected at most {limit}")
    try:
        message: M = _decoder(expected).decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PeerError(f"{kind}: {error}") from None
    if encode(message) != data:
        raise PeerError(f"{kind}: not in the one form such a message has")
    return message


def size_limit(expected: type[Message], config: RoundConfig) -> int:
    """Returns the bytes beyond which a message of this kind cannot be honest in this round."""
    n = len(config.cohort)
    body = {
        Advertisement: 2 * KEY_BYTES + SIGNATURE_BYTES,
        KeyList: n * (2 * KEY_BYTES + SIGNATURE_BYTES + 16),
        EncryptedShares: DIGEST_BYTES + n * ENCRYPTED_SHARE_BYTES,
        Delivery: n * (ENCRYPTED_SHARE_BYTES + _INDEX_BYTES),
        MaskedInput: sum(8 + -(-segment.length * segment.bits // 8) for segment in config.segments),
        Survivors: n * _INDEX_BYTES,
        Vote: SIGNATURE_BYTES,
        Quorum: n * (SIGNATURE_BYTES + _INDEX_BYTES),
        Reveal: n * ELEMENT_BYTES,
    }
    return _NAME_OVERHEAD + DIGEST_BYTES + body[expected]


def increasing(indices: Sequence[int]) -> bool:
    """Returns whether a list of indices is in its one form: strictly increasing, so without repetition."""
    return all(before < after for before, after in pairwise(indices))


def pieces(data: bytes, size: int) -> list[bytes]:
    """Cuts bytes into the equal pieces that they were joined from."""
    return [data[start : start + size] for start in range(0, len(data), size)]


@lru_cache(maxsize=32)
def _decoder(expected: type[Message]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(expected)
