"""The calls of a device to its server; docs/wire-protocol.md describes them for other implementations.

    POST /v1/device/connect     nothing -> nothing           the device is online from now on
    POST /v1/device/beat        nothing -> nothing           it still is
    POST /v1/device/leave       nothing -> nothing           it is not any more
    POST /v1/device/take        nothing -> Taken             its next message
    POST /v1/device/read        ReadPart -> bytes            a piece of a large message
    POST /v1/device/bring       BringAnswer -> nothing       its answer
    POST /v1/device/announce    AnnounceAnswer -> Received   a large answer is to come
    POST /v1/device/append      AppendPiece -> Received      the next piece of it

The key that signed a call says whose it is, so no call names its device. A message of no more bytes than one piece of a
large one travels whole; a larger one, and a large answer, go on after a broken connection where they were. Calls state
no protocol version except in their paths: the registration must still reach a device of another version, to tell both
sides about it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedtune.core.protocol.messages import MAX_PAYLOAD_BYTES, Payload

CONNECT, BEAT, LEAVE = "/v1/device/connect", "/v1/device/beat", "/v1/device/leave"
TAKE, READ_PART = "/v1/device/take", "/v1/device/read"
BRING, ANNOUNCE, APPEND = "/v1/device/bring", "/v1/device/announce", "/v1/device/append"

HEARTBEAT_SECONDS = 15.0  # the server counts a device as offline after two of these
MAX_PIECE_BYTES = 128 << 10  # of a large message, up or down: 20 s over a link of 50 kbit/s
MAX_CALL_BYTES = MAX_PIECE_BYTES + 4096
MAX_PARTS = 2
MAX_REASON = 500  # characters in a refusal

_MessageId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Label = Annotated[str, Meta(max_length=200)]
_Size = Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]
_Piece = Annotated[bytes, Meta(max_length=MAX_PIECE_BYTES)]


class Assignment(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A message to a device.

    Args:
        message: its id, which the answer names.
        action: what is asked for: its type.
        group: label that the messages of one round share.
        parts: its payloads; none where they are too large for one answer.
        sizes: the payloads' bytes, where the device is to read them piece by piece; none otherwise.
    """

    message: _MessageId
    action: Annotated[str, Meta(pattern=r"^[a-z_.]{1,64}\Z")]
    group: _Label
    parts: Annotated[tuple[_Piece, ...], Meta(max_length=MAX_PARTS)]
    sizes: Annotated[tuple[_Size, ...], Meta(max_length=MAX_PARTS)] = ()


class Taken(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The next message to a device, which is handed out only once; None if none waits."""

    assignment: Assignment | None


class ReadPart(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A request for the bytes of a large payload from an offset on, one piece of them at most.

    The answer is these bytes alone.
    """

    message: _MessageId
    part: Annotated[int, Meta(ge=0, lt=MAX_PARTS)]
    offset: _Size


class Refused(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A device's refusal: the reason for people, and whether it sits out, so that it may be asked again later."""

    reason: Annotated[str, Meta(max_length=MAX_REASON)]
    sits_out: bool


class BringAnswer(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A device's answer to a message; it may be repeated.

    Args:
        seconds: duration of the work.
        payload: the answer's bytes; empty with a refusal.
    """

    message: _MessageId
    seconds: Annotated[float, Meta(ge=0)]
    payload: _Piece
    refused: Refused | None = None


class AnnounceAnswer(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The announcement of an answer that is larger than a piece; repeated, it asks how much has arrived.

    Args:
        seconds: duration of the work.
        size: its bytes.
        digest: SHA-256 of it.
    """

    message: _MessageId
    seconds: Annotated[float, Meta(ge=0)]
    size: Annotated[int, Meta(gt=MAX_PIECE_BYTES, le=MAX_PAYLOAD_BYTES)]
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]


class AppendPiece(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The next piece of an announced answer; one whose offset is not where the server is changes nothing."""

    message: _MessageId
    offset: _Size
    content: Annotated[bytes, Meta(min_length=1, max_length=MAX_PIECE_BYTES)]


class Received(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """How many bytes of an announced answer the server has, from its beginning."""

    size: _Size
