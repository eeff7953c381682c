"""Messages between server and clients: the types of requests to a client, and typed payloads with their form as bytes.

A round in the clear is one `TRAIN`. A secure round is `SECURE_EXCHANGES`, in their order;
`fedtune.strategies.secure_sum` describes their content. A payload is one msgpack array of bounded size, tagged with its
kind, and travels as one byte array over any transport:

    data = encode(TrainRequest(...))
    request = decode(data, TrainRequest)

A request is the same for all clients that hold the same version of the adapter and train the same tier. Clients derive
everything else that differs between them, such as their seeds, from their names, so a server serialises once for each
version and tier.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from fedtune.core.adapter.layout import AdapterKind
from fedtune.core.errors import PeerError
from fedtune.core.job.local_work import LocalWork

TRAIN, EVALUATE = "train", "evaluate"  # flwr.app.MessageType's
OPEN, SHARE, VOTE, UNMASK = "open", "share", "vote", "unmask"  # actions of query messages


def query(action: str) -> str:
    """Returns the message type of a query, as Flower writes it."""
    return f"query.{action}"


SECURE_EXCHANGES = (query(OPEN), query(SHARE), TRAIN, query(VOTE), query(UNMASK))


@dataclass(frozen=True)
class Request:
    """One message to a client, as plain values.

    Args:
        action: message type.
        group: label that the messages of one round share, such as the round's number.
        parts: payloads, `parts_of(action)` of them.
    """

    action: str
    group: str
    parts: tuple[bytes, ...]


Handler = Callable[[str, Request], bytes]
"""Maps (client, request) to the payload of the reply; an error that it raises becomes an error reply."""


def parts_of(action: str) -> int:
    """Counts the payloads of a message: two, the configuration and the request, open a secure round."""
    return 2 if action == query(OPEN) else 1


@dataclass(frozen=True)
class Refusal:
    """A device's refusal of a request.

    Args:
        reason: sentence for people; no program reads it.
        sits_out: whether one of its owner's conditions does not hold now, so that the device may be asked again later.
    """

    reason: str
    sits_out: bool = False


PROTOCOL_VERSION = 4
MAX_PAYLOAD_BYTES = 1 << 30
MAX_TEXT = 4096
MAX_COUNT = 1 << 40
MAX_TIERS = 32
HEADER_BYTES = 64 << 10  # all fields besides the vector fit in it

_Text = Annotated[str, Meta(max_length=MAX_TEXT)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
_Bytes = Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]
_Tier = Annotated[int, Meta(ge=1, le=1024)]
_Loss = Annotated[float, Meta(ge=0, le=1e6)]  # bounded, so that no client can make a mean overflow


class Payload(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The base class of all payloads."""


class Base(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The frozen base model of the adapter and the adapter's layout on it; the same for the whole job.

    Args:
        fixed: digest of a core adapter's fixed factors, which a device computes by itself; "" for LoRA, which has none.
    """

    name: _Text
    digest: _Digest
    quantization: Literal["nf4", "int4", "none"]
    rank: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Annotated[float, Meta(gt=0)]
    target_modules: Annotated[tuple[_Text, ...], Meta(max_length=4096)]
    sequence_length: Annotated[int, Meta(ge=8, le=1 << 20)]
    kind: AdapterKind = "lora"
    fixed: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""


class Uplink(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The settings of the uplink in a round; `clips` has one entry per trained factor.

    Args:
        form: name of one of `fedtune.core.codec.update_forms`; a device refuses a form that it does not know.
        tiers: numbers of rank indices that clients of this round train, ascending; empty where all clients train all.
        rho: ρ that a client spends in the round under differential privacy (fedtune.core.privacy); 0 without.
        noised: clients whose noise is in a sum for certain, by slice, the smallest tier's first; none where the server
            adds the noise.
    """

    form: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}\Z")]
    bits: Annotated[int, Meta(ge=1, le=8)]
    density: Annotated[float, Meta(gt=0, le=1)]
    error_feedback: bool
    n_max: Annotated[int, Meta(ge=1, le=65_535)]
    clips: Annotated[tuple[Annotated[float, Meta(ge=1e-12, le=1e12)], ...], Meta(min_length=1, max_length=2)]
    rotation: bool
    tiers: Annotated[tuple[_Tier, ...], Meta(max_length=MAX_TIERS)] = ()
    rho: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    noised: Annotated[tuple[Annotated[int, Meta(ge=1, le=65_535)], ...], Meta(max_length=MAX_TIERS)] = ()


class Downlink(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """An adapter, as the change of one that the device holds.

    Args:
        basis: digest of the adapter that `parts` change; "" for the job's first adapter, which follows from the seed.
        digest: digest of the resulting adapter; the device refuses another result.
        parts: one payload of `fedtune.core.codec.downlink` for each factor, in the order of the flat vector.
    """

    basis: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
    digest: _Digest
    parts: Annotated[tuple[_Bytes, ...], Meta(min_length=1, max_length=2)]


class Rebasing(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The last change of the adapter's basis; see `fedtune.core.adapter.basis.basis_changes`.

    Args:
        round: round after which it was made.
        digest: digest of the adapter that devices held in that round, from which the change follows.
        before: round of the previous change, or 0.
    """

    round: _Count
    digest: _Digest
    before: _Count


class TrainRequest(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The request to train an adapter and to send back the update.

    Args:
        tier: number of rank indices that this client trains, one of `uplink.tiers`; 0 where that is empty.
        rebasing: change of basis that residuals of earlier rounds must follow; None where the basis never changed.
    """

    version: int
    job_seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    round: _Count
    base: Base
    work: LocalWork
    uplink: Uplink
    adapter: Downlink
    tier: Annotated[int, Meta(ge=0, le=1024)] = 0
    rebasing: Rebasing | None = None


class TrainReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's update, one payload for each of the terms of its tier, and the facts of its training."""

    round: _Count
    examples: _Count
    tokens: _Count
    steps: _Count
    loss: _Loss
    seconds: Annotated[float, Meta(ge=0)]
    update: Annotated[tuple[_Bytes, ...], Meta(min_length=1, max_length=2 * MAX_TIERS)]


class EvaluateRequest(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The request to evaluate an adapter on the client's held-out examples."""

    version: int
    job_seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    round: _Count
    base: Base
    holdout: Annotated[float, Meta(ge=0, lt=1)]
    adapter: Downlink


class EvaluateReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's evaluation. The server adds up `loss` and `exact_match` times their counts."""

    round: _Count
    examples: _Count
    tokens: _Count
    loss: _Loss
    exact_match: Annotated[float, Meta(ge=0, le=1)]


P = TypeVar("P", bound=Payload)

_PLACEHOLDER = Downlink("", "0" * 64, (b"", b""))


def terms_digest(request: TrainRequest) -> bytes:
    """Returns a hash over a request without its downlink and tier, which differ between clients."""
    common = msgspec.structs.replace(request, adapter=_PLACEHOLDER, tier=0)
    return hashlib.sha256(msgspec.msgpack.encode(common)).digest()


def encode(payload: Payload) -> bytes:
    """Returns the payload as bytes; equal payloads give equal bytes."""
    return msgspec.msgpack.encode(payload)


def decode(data: bytes | memoryview, kind: type[P], limit: int = MAX_PAYLOAD_BYTES) -> P:
    """Reads a payload of one kind.

    Args:
        data: bytes from the other side.
        kind: the only kind that is accepted.
        limit: largest number of bytes; a caller that knows the adapter's size sets less than the default.

    Raises:
        PeerError: the bytes are too many, truncated, of another kind or protocol version, or a field is missing,
            unknown, of a wrong type or out of bounds.
    """
    if len(data) > limit:
        raise PeerError(f"{kind.__name__}: {len(data)} bytes; at most {limit} are accepted")
    try:
        payload = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _check_version(kind, _stated_version(data, kind))  # another version may have other fields
        raise PeerError(f"{kind.__name__}: {error}") from error
    _check_version(kind, getattr(payload, "version", PROTOCOL_VERSION))
    if not _finite(payload):
        raise PeerError(f"{kind.__name__}: a number in it is not finite")
    return payload


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """The beginning of a payload that states its version; the rest is skipped."""

    kind: str
    version: int


def _check_version(kind: type[Payload], version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise PeerError(
            f"{kind.__name__}: protocol version {version}; this side speaks {PROTOCOL_VERSION}. "
            "Install the same fedtune version on server and clients"
        )


def _stated_version(data: bytes | memoryview, kind: type[Payload]) -> int:
    """Returns the version that a payload of any version states in its first field, or this side's if it states none."""
    try:
        head = msgspec.msgpack.decode(data, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return PROTOCOL_VERSION
    states_one = head.kind == kind.__name__ and kind.__struct_fields__[:1] == ("version",)
    return head.version if states_one else PROTOCOL_VERSION


def _finite(payload: msgspec.Struct) -> bool:
    return all(
        _finite(value) if isinstance(value, msgspec.Struct) else not isinstance(value, float) or math.isfinite(value)
        for value in msgspec.structs.astuple(payload)
    )
