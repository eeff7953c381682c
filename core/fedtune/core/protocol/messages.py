"""Messages between server and clients: the actions that a client is asked for, and typed payloads <-> bytes.

A round in the clear is one `TRAIN`. A secure round is `SECURE_EXCHANGES`, in their order;
`fedtune.strategies.secure_sum` says what each carries. One payload is one msgpack array of bounded size, tagged with
its kind, and travels as one byte array whatever carries it:

    data = encode(TrainRequest(...))
    request = decode(data, TrainRequest)

A request is the same for all clients that come from the same version of the adapter and train the same tier: what else
differs between them (their seed, their data) they derive themselves from their names, so a server serialises once for
each version and tier.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

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
        action: its message type.
        group: what the messages of one round have in common, such as the round's number.
        node: the number of the node that is asked.
        parts: payloads, `parts_of(action)` of them.
    """

    action: str
    group: str
    node: int
    parts: tuple[bytes, ...]


Handler = Callable[[str, Request], bytes]
"""(client, request) -> the payload of its reply; an error that it raises becomes an error reply."""


def parts_of(action: str) -> int:
    """Counts the payloads of a message: two, the configuration and the request, open a secure round."""
    return 2 if action == query(OPEN) else 1


@dataclass(frozen=True)
class Refusal:
    """A device's reason not to do what it was asked.

    Args:
        reason: a sentence for people; no program reads it.
        sits_out: whether one of its owner's conditions does not hold now. The device may be asked again later.
    """

    reason: str
    sits_out: bool = False


PROTOCOL_VERSION = 1
MAX_PAYLOAD_BYTES = 1 << 30
MAX_TEXT = 4096
MAX_COUNT = 1 << 40
MAX_TIERS = 32
HEADER_BYTES = 64 << 10  # every field beside the vector fits in this

_Text = Annotated[str, Meta(max_length=MAX_TEXT)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
_Bytes = Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]
_Tier = Annotated[int, Meta(ge=1, le=1024)]
_Loss = Annotated[float, Meta(ge=0, le=1e6)]  # bounded, so that no client can make a mean overflow


class Payload(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that travels."""


class Base(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Which frozen base the adapter belongs to, and how the adapter sits on it; the same all through a job."""

    name: _Text
    digest: _Digest
    quantization: Literal["nf4", "none"]
    rank: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Annotated[float, Meta(gt=0)]
    target_modules: Annotated[tuple[_Text, ...], Meta(max_length=4096)]
    sequence_length: Annotated[int, Meta(ge=8, le=1 << 20)]


class Uplink(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """How updates travel up; `selection_phases` and `clips` have one entry a trained factor.

    Args:
        form: the name of one of `fedtune.core.codec.update_forms`; a device refuses one that it does not know.
        tiers: how many rank indices clients of this round train, ascending; none where everybody trains them all.
    """

    form: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}\Z")]
    bits: Annotated[int, Meta(ge=1, le=8)]
    density: Annotated[float, Meta(gt=0, le=1)]
    error_feedback: bool
    weight: Literal["examples", "tokens", "uniform"]
    weight_cap: Annotated[int, Meta(ge=1, le=1 << 20)]
    n_max: Annotated[int, Meta(ge=1, le=65_535)]
    selection_phases: Annotated[tuple[_Count, ...], Meta(min_length=1, max_length=2)]
    clips: Annotated[tuple[Annotated[float, Meta(ge=1e-12, le=1e12)], ...], Meta(min_length=1, max_length=2)]
    rotation: bool
    tiers: Annotated[tuple[_Tier, ...], Meta(max_length=MAX_TIERS)] = ()


class Downlink(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """An adapter, as what changes in one that the device holds.

    Args:
        basis: digest of the adapter that `parts` change; "" is the one every job starts from, which follows from seed.
        digest: of the adapter that results; another result is refused.
        parts: one payload of `fedtune.core.codec.downlink` for `lora_a`, one for `lora_b`.
    """

    basis: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
    digest: _Digest
    parts: tuple[_Bytes, _Bytes]


class Rebasing(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The last change of the adapter's basis; see `fedtune.core.adapter.basis.basis_changes`.

    Args:
        round: after which it was made.
        digest: of the adapter that devices held in that round, from which it follows.
        before: the round of the change before, or 0.
    """

    round: _Count
    digest: _Digest
    before: _Count


class TrainRequest(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Train this adapter, and send back what changed.

    Args:
        tier: how many rank indices this client trains, one of `uplink.tiers`; 0 where those are none.
        rebasing: what a residual of an earlier round must follow; None where the basis never changed.
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
    """Trained minus received, one payload for each of the terms of the client's tier, and what it took."""

    round: _Count
    examples: _Count
    tokens: _Count
    steps: _Count
    loss: _Loss
    seconds: Annotated[float, Meta(ge=0)]
    update: Annotated[tuple[_Bytes, ...], Meta(min_length=1, max_length=2 * MAX_TIERS)]


class EvaluateRequest(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Evaluate this adapter on the examples the client keeps back."""

    version: int
    job_seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    round: _Count
    base: Base
    holdout: Annotated[float, Meta(ge=0, lt=1)]
    adapter: Downlink


class EvaluateReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A client's evaluation: sums a server can add up are `loss` and `exact_match` times their counts."""

    round: _Count
    examples: _Count
    tokens: _Count
    loss: _Loss
    exact_match: Annotated[float, Meta(ge=0, le=1)]


P = TypeVar("P", bound=Payload)

_NOBODYS = Downlink("", "0" * 64, (b"", b""))


def terms_digest(request: TrainRequest) -> bytes:
    """One hash over all that a request asks, but for the way the adapter travels and the tier: those differ between
    clients."""
    common = msgspec.structs.replace(request, adapter=_NOBODYS, tier=0)
    return hashlib.sha256(msgspec.msgpack.encode(common)).digest()


def encode(payload: Payload) -> bytes:
    """Returns the payload as bytes; equal payloads give equal bytes."""
    return msgspec.msgpack.encode(payload)


def decode(data: bytes | memoryview, kind: type[P], limit: int = MAX_PAYLOAD_BYTES) -> P:
    """Reads a payload of one kind.

    Args:
        data: what came from the other side.
        kind: the only kind that is accepted here.
        limit: most bytes accepted; a caller that knows the adapter's size says less than the default.

    Raises:
        PeerError: too large, truncated, of another kind, a field missing, unknown, of a wrong type or out of bounds, or
            of another protocol version.
    """
    if len(data) > limit:
        raise PeerError(f"{kind.__name__}: {len(data)} bytes; at most {limit} are accepted")
    try:
        payload = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _check_version(kind, _stated_version(data, kind))  # other fields are what another version would have
        raise PeerError(f"{kind.__name__}: {error}") from error
    _check_version(kind, getattr(payload, "version", PROTOCOL_VERSION))
    if not _finite(payload):
        raise PeerError(f"{kind.__name__}: a number in it is not finite")
    return payload


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """How a payload begins that states its version; whatever follows is skipped."""

    kind: str
    version: int


def _check_version(kind: type[Payload], version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise PeerError(
            f"{kind.__name__}: protocol version {version}; this side speaks {PROTOCOL_VERSION}. "
            "Install the same fedtune version on server and clients"
        )


def _stated_version(data: bytes | memoryview, kind: type[Payload]) -> int:
    """The version that a payload of any version states, as its first field; this side's where it states none."""
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
