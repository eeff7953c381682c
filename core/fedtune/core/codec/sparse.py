"""The codec for updates in the clear of which a part is sent now, and the rest later: the largest coordinates.

    k largest of the update -> round to a step -> entropy-code

Without error feedback the same coordinates stay behind in every round, so this codec is for clients that take part
often and keep a residual. The step follows from the values sent, δ = 2κσ/(2^b - 1) with σ their root mean square, so
`bits` means about the same as in the ring. There is no largest level and hence no outlier problem: one step for the
whole segment, with a coder that adapts to each block's class, costs fewer bytes at the same error than four fixed bits
with block scales.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.clipping import check_update, finite_norm
from fedtune.core.codec.coordinate_selection import select_largest
from fedtune.core.codec.entropy import decode_levels, encode_levels, max_coded_size
from fedtune.core.codec.quantization import MAX_STEP, MIN_STEP, levels_to_values, nearest_levels, relative_step
from fedtune.core.codec.wire import Kind, Reader, frame, unframe
from fedtune.core.errors import PeerError

_STEP = struct.Struct("<f")


@dataclass(frozen=True)
class SparseCodec:
    """Encodes an update with loss, and decodes it; the caller keeps the rest as its residual.

        data = codec.encode(update)
        residual = update - codec.decode(data, update.size)

    Args:
        density: share of coordinates that is sent, in (0, 1].
        bits: resolution of their values, 2 to 8: steps of 6/(2^bits - 1) of their root mean square.
    """

    density: float
    bits: int

    def encode(self, update: NDArray[np.float32]) -> bytes:
        """Returns the payload of a flat float32 update.

        Raises:
            UpdateError: the update holds NaN, infinity or an absurd magnitude.
        """
        check_update(update)
        mask = select_largest(update, self.density)
        step = root_mean_square_step(update[mask], self.bits)
        levels = nearest_levels(update, step)
        levels *= mask
        return frame(Kind.SPARSE, update.size, encode_step(step) + encode_levels(levels))

    def decode(self, data: bytes | memoryview, count: int) -> NDArray[np.float32]:
        """Returns the update that `data` carries; float32, shape (count,), finite.

        Raises:
            PeerError: the payload is not well-formed, or not for `count` coordinates.
        """
        _, body = unframe(data, frozenset({Kind.SPARSE}), count, max_levels_size(count))
        return decode_values(body, count)


def root_mean_square_step(values: NDArray[np.float32], bits: int) -> np.float32:
    """Returns the `relative_step` of these values."""
    return relative_step(finite_norm(values) / sqrt(max(values.size, 1)), bits)


def encode_step(step: np.float32) -> bytes:
    return _STEP.pack(float(step))


def decode_values(body: memoryview, count: int) -> NDArray[np.float32]:
    """Decodes a body of step and levels to their product; the body must hold nothing else.

    Raises:
        PeerError: the body is malformed or its values are not finite.
    """
    reader = Reader(body)
    step = take_step(reader)
    levels = decode_levels(reader, count)
    reader.finish()
    return levels_to_values(levels, step)


def take_step(reader: Reader) -> np.float32:
    """Reads a step.

    Raises:
        PeerError: the body is too short, or with this step values could be infinite or meaningless.
    """
    (step,) = _STEP.unpack(reader.take(_STEP.size, "the step"))
    if not MIN_STEP <= step <= MAX_STEP:
        raise PeerError(f"payload: with a step of {step} it would not decode to finite, sensible values")
    return np.float32(step)


def max_levels_size(count: int) -> int:
    """Returns the most bytes that a body of step and levels has."""
    return _STEP.size + max_coded_size(count)
