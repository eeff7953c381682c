"""The lossless codec, plain float32: for the preset `none`, and the fallback where exactness is needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.clipping import finite_norm
from fedtune.core.codec.wire import Kind, frame, unframe
from fedtune.core.errors import PeerError


class ExactCodec:
    """Encodes an update in four bytes a coordinate, and decodes it bit for bit."""

    def encode(self, update: NDArray[np.float32]) -> bytes:
        """Returns the payload of a flat float32 update.

        Raises:
            UpdateError: the update holds NaN or infinity.
        """
        finite_norm(update)
        return frame(Kind.EXACT, update.size, update.astype("<f4", copy=False).tobytes())

    def decode(self, data: bytes | memoryview, count: int) -> NDArray[np.float32]:
        """Returns the update that `data` carries; float32, shape (count,), finite.

        Raises:
            PeerError: the payload is not well-formed, or not for `count` coordinates.
        """
        _, body = unframe(data, frozenset({Kind.EXACT}), count, exact_size(count))
        return exact_values(body, count)


def exact_values(body: memoryview, count: int) -> NDArray[np.float32]:
    """Returns the vector in the body of an exact payload.

    Raises:
        PeerError: the body has another size, or holds NaN or infinity.
    """
    if len(body) != exact_size(count):
        raise PeerError(f"payload: {count} exact coordinates take {exact_size(count)} bytes, got {len(body)}")
    values = np.frombuffer(body, dtype="<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise PeerError("payload: it decodes to NaN or infinity")
    return values


def exact_size(count: int) -> int:
    """Returns the size of an exact body in bytes."""
    return 4 * count
