"""The codec for updates in the clear of which nothing is left out or kept: all values, dithered and entropy-coded.

    round(x/δ + U - 1/2) -> entropy-code

The step follows from the update, δ = 6σ/(2^b - 1) with σ its root mean square, and U from a seed that travels along.
The error of a value is uniform on ±δ/2, whatever the value is, and independent between clients: in the mean of n
updates its power is δ²/12n. So a client may take part once or always, and a small change that many clients agree on
arrives, which nearest rounding would lose in every round (benchmarks/compression/mean_error.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.clipping import check_update
from fedtune.core.codec.entropy import decode_levels, encode_levels
from fedtune.core.codec.quantization import dithered_levels, dithered_values
from fedtune.core.codec.sparse import encode_step, max_levels_size, root_mean_square_step, take_step
from fedtune.core.codec.wire import Kind, Reader, frame, unframe
from fedtune.core.errors import PeerError

_SEED = struct.Struct("<Q")


@dataclass(frozen=True)
class DenseCodec:
    """Encodes an update with unbiased loss, and decodes it.

    Args:
        bits: resolution, 2 to 8: steps of 6/(2^bits - 1) of the update's root mean square.
    """

    bits: int

    def encode(self, update: NDArray[np.float32], seed: int) -> bytes:
        """Returns the payload of a flat float32 update.

        Args:
            seed: seed of the rounding, different for every client, segment and round; below 2^63.

        Raises:
            UpdateError: the update holds NaN, infinity or an absurd magnitude.
        """
        check_update(update)
        step = root_mean_square_step(update, self.bits)
        levels = encode_levels(dithered_levels(update, step, seed))
        return frame(Kind.DENSE, update.size, encode_step(step) + _SEED.pack(seed) + levels)

    def decode(self, data: bytes | memoryview, count: int) -> NDArray[np.float32]:
        """Returns the update that `data` carries; float32, shape (count,), finite.

        Raises:
            PeerError: the payload is not well-formed, or not for `count` coordinates.
        """
        _, body = unframe(data, frozenset({Kind.DENSE}), count, max_dense_size(count))
        reader = Reader(body)
        step = take_step(reader)
        (seed,) = _SEED.unpack(reader.take(_SEED.size, "the seed"))
        levels = decode_levels(reader, count)
        reader.finish()
        values = dithered_values(levels, step, seed)
        if not np.isfinite(values).all():
            raise PeerError("payload: it leads to NaN or infinity")
        return values


def max_dense_size(count: int) -> int:
    """Returns the most bytes that a body of step, seed and levels has."""
    return _SEED.size + max_levels_size(count)
