"""The frame around every payload, and bounded reading of its body.

    offset  size  field
    0       2     magic "fu"
    2       1     version
    3       1     kind
    4       4     count: coordinates of the vector, little-endian
    8       4     size of the body in bytes, little-endian
    12      4     CRC-32 of bytes 0 to 11 and the body, little-endian
    16            body

The checksum detects accidental damage, not attacks; signatures and authentication tags protect the sender's identity.
Every payload is checked in full before memory is allocated from the sizes that it states.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from zlib import crc32

from fedtune.core.errors import PeerError

VERSION = 3
FRAME_SIZE = 16
MAX_COUNT = 1 << 30  # coordinates of one segment: 4 GiB of float32

_MAGIC = b"fu"
_HEAD = struct.Struct("<2sBBII")
_CHECKSUM = struct.Struct("<I")


class Kind(IntEnum):
    """The kind of a body."""

    EXACT = 1  # a vector as float32
    SPARSE = 2  # a client update as levels and a step
    DELTA = 3  # levels and a step, to be added to what the device holds
    DENSE = 4  # a client update as levels, a step and the seed of their dither
    RING = 5  # packed ring words and auxiliary sums, to be added to those of others


def frame(kind: Kind, count: int, body: bytes) -> bytes:
    """Returns the payload that carries `body`."""
    head = _HEAD.pack(_MAGIC, VERSION, kind, count, len(body))
    return head + _CHECKSUM.pack(crc32(body, crc32(head))) + body


def unframe(data: bytes | memoryview, kinds: frozenset[Kind], count: int, max_body: int) -> tuple[Kind, memoryview]:
    """Returns the kind and the body of a payload.

    Args:
        data: the payload.
        kinds: the kinds that are expected here.
        count: number of coordinates of the segment that the payload must be for.
        max_body: the most bytes that an honest body of such a segment has.

    Raises:
        PeerError: the payload is truncated, padded, oversized, damaged, of another version or kind, or for another
            size.
    """
    view = memoryview(data).cast("B")
    if len(view) > FRAME_SIZE + max_body:
        raise PeerError(f"payload: at most {FRAME_SIZE + max_body} bytes for {count} coordinates, got {len(view)}")
    if len(view) < FRAME_SIZE:
        raise PeerError(f"payload: truncated, a frame has {FRAME_SIZE} bytes before its body and {len(view)} arrived")
    magic, version, kind, claimed_count, size = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        raise PeerError(f"payload: not an update, it begins with {magic.hex()} instead of {_MAGIC.hex()}")
    if version != VERSION:
        raise PeerError(f"payload: format version {version}, this side reads version {VERSION}")
    if kind not in kinds:
        raise PeerError(f"payload: kind {kind}, expected {' or '.join(sorted(known.name for known in kinds))}")
    if claimed_count != count:
        raise PeerError(f"payload: for a segment of {claimed_count} coordinates, this one has {count}")
    body = view[FRAME_SIZE:]
    if len(body) != size:
        raise PeerError(f"payload: its body claims {size} bytes and has {len(body)}")
    (checksum,) = _CHECKSUM.unpack_from(view, _HEAD.size)
    if crc32(body, crc32(view[: _HEAD.size])) != checksum:
        raise PeerError("payload: damaged, its checksum does not match")
    return Kind(kind), body


class Reader:
    """Reads a body from front to back; reading past its end raises PeerError."""

    def __init__(self, body: memoryview) -> None:
        self._rest = body

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self._rest):
            raise PeerError(f"payload: {what} takes {size} bytes and {len(self._rest)} are left")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def take_number(self, size: int, what: str) -> int:
        """Reads an unsigned little-endian number of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def finish(self) -> None:
        """Raises PeerError if bytes are left."""
        if len(self._rest):
            raise PeerError(f"payload: {len(self._rest)} bytes too many at its end")
