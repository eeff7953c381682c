"""The messages of the five exchanges and their form as bytes, with every size bounded.

    exchange          server to client        client to server
    0  advertise      RoundConfig             Advertisement
    1  share          KeyList                 EncryptedShares
    2  masked input   Delivery                MaskedInput
    3  consistency    Survivors               Vote
    4  unmask         Quorum                  Reveal

A message is one msgpack array that begins with its name. Clients are identified by their *client index*, the position
in the configuration's cohort. Lists of client indices are strictly increasing, and the values for each client of an
agreed list are joined without lengths. Every message has exactly one form as bytes; other bytes are refused.
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

_NAME_OVERHEAD = 64  # more than a message's name, list headers and config digest take besides the counted parts
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
    """The base class of all messages."""


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A vector that is summed in its own ring over the clients of some tiers.

    Attributes:
        name: name, distinct within the round.
        length: number of words.
        bits: ℓ, where the ring is the integers modulo 2^ℓ.
        limit: largest word that one client may contribute, so that no honest sum wraps around; None where words are
            taken modulo 2^ℓ, and sums may.
        tiers: tiers that carry it, strictly increasing.
    """

    name: Name
    length: Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
    bits: Annotated[int, Meta(ge=1, le=62)]
    limit: Annotated[int, Meta(ge=0, lt=1 << 62)] | None
    tiers: Annotated[tuple[Index, ...], Meta(min_length=1, max_length=MAX_TIERS)]


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An invited client and the tier it trains in."""

    client: Name
    tier: Index


class RoundConfig(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The configuration of a round, on which both sides must agree; every later statement includes its digest.

    Attributes:
        job, round, attempt: identity of the round; an aborted round is tried again under the next attempt.
        nonce: random bytes that the server draws for this round.
        base_digest, adapter_digest: digests of the base model and the adapter that the client must have loaded.
        context: public parameters of the codec (selection seed, clip, bits), opaque here.
        cohort: invited clients; a position is a client index.
        tier_minimums: for each tier, the number of survivors below which the round has no sum.
        segments: vectors that are summed.
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
    """One client's advertisement, as the server relays it to all clients."""

    client_index: ClientIndex
    share_key: Key
    mask_key: Key
    signature: Signature


class KeyList(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The keys of all clients that advertised, by increasing client index: the set U1."""

    config: Digest
    entries: Annotated[tuple[KeyEntry, ...], Meta(max_length=MAX_COHORT)]


class EncryptedShares(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's shares, encrypted for each other holder in U1, by increasing client index, and a commitment to b."""

    config: Digest
    commitment: Digest
    encrypted_shares: Annotated[bytes, Meta(max_length=MAX_COHORT * ENCRYPTED_SHARE_BYTES)]


class Delivery(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The sharers (the set U2), and the encrypted shares for one client from the others in U2, by client index."""

    config: Digest
    sharers: ClientIndices
    encrypted_shares: Annotated[bytes, Meta(max_length=MAX_COHORT * ENCRYPTED_SHARE_BYTES)]


class MaskedInput(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The masked vector: packed words for each segment of the client's tier, in the configuration's order."""

    config: Digest
    segments: Annotated[tuple[bytes, ...], Meta(max_length=MAX_SEGMENTS)]


class Survivors(Message, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The clients whose masked update is in the sum: the set U3."""

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
    """Returns the one form of a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, expected: type[M], limit: int) -> M:
    """Reads a message of the expected kind.

    Raises:
        PeerError: the bytes are longer than `limit`, not such a message, not in its one form as bytes, or a field is
            out of bounds.
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
    """Returns whether a list of indices is strictly increasing, and so without repetition."""
    return all(before < after for before, after in pairwise(indices))


def pieces(data: bytes, size: int) -> list[bytes]:
    """Cuts bytes into the pieces of equal size from which they were joined."""
    return [data[start : start + size] for start in range(0, len(data), size)]


@lru_cache(maxsize=32)
def _decoder(expected: type[Message]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(expected)
