"""Random bits for the codecs, the same on every machine and under every numpy version.

Only raw 64-bit outputs of SFC64 are used: numpy promises those for good, while its distributions may change between
versions, and a selection or a rotation that two machines draw differently would ruin the sum without a sound. None of
these streams keeps a secret.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.core.seeds import derive_seed

_BITS_PER_RAW = 64


def open_stream(seed: int, purpose: str) -> np.random.SFC64:
    """The stream of one purpose under one seed, at its beginning."""
    return np.random.SFC64(derive_seed(seed, purpose))


def draw_uint16(stream: np.random.SFC64, count: int) -> NDArray[np.uint16]:
    """The next `count` uniform 16-bit integers; what is left of the last 64-bit output is dropped."""
    return _draw(stream, count, 16).view("<u2")[:count]


def draw_uint32(stream: np.random.SFC64, count: int) -> NDArray[np.uint32]:
    """The next `count` uniform 32-bit integers; what is left of the last 64-bit output is dropped."""
    return _draw(stream, count, 32).view("<u4")[:count]


def draw_signs(stream: np.random.SFC64, count: int) -> NDArray[np.float32]:
    """The next `count` uniform signs, -1 or +1; bit j of an output, from the lowest, is sign j: 0 is +1."""
    bits = np.unpackbits(_draw(stream, count, 1).view(np.uint8), bitorder="little")[:count]
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def _draw(stream: np.random.SFC64, count: int, bits: int) -> NDArray[np.uint64]:
    raw: NDArray[np.uint64] = stream.random_raw(-(-count * bits // _BITS_PER_RAW))
    return raw.astype("<u8", copy=False)
