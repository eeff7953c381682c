"""Random streams, each bound to its purpose, so that no two streams are the same by accident.

    generator(job_seed, "cohort", round)        # numpy's distributions, for decisions of one machine
    open_stream(seed, "rotation")               # raw bits, for values that two machines must draw alike

The second kind uses only raw 64-bit outputs of SFC64. numpy guarantees those, while its distributions may change
between versions, and a selection or a rotation that two machines draw differently would corrupt the sum without an
error. None of these streams is cryptographically secure.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

SEED_BITS = 63  # the width that both torch.manual_seed and a TOML integer can hold


def derive_seed(job_seed: int, purpose: str, *indices: int | str) -> int:
    """Derives the seed of one random stream.

    seed = first 63 bits of SHA-256("fedtune-seed" ‖ job_seed ‖ purpose ‖ indices)

    Args:
        job_seed: `training.seed` of the job.
        purpose: purpose of the stream, e.g. "train" or "cohort".
        indices: values that distinguish streams of one purpose, e.g. round and client.

    Returns:
        A non-negative integer below 2**63, the same on every platform.
    """
    text = "\x1f".join(["fedtune-seed", str(job_seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - SEED_BITS)


def generator(job_seed: int, purpose: str, *indices: int | str) -> np.random.Generator:
    """Returns a numpy generator whose seed is that of `derive_seed`."""
    return np.random.Generator(np.random.Philox(derive_seed(job_seed, purpose, *indices)))


_BITS_PER_RAW = 64


def open_stream(seed: int, purpose: str) -> np.random.SFC64:
    """Returns the stream of one purpose under one seed, at its beginning."""
    return np.random.SFC64(derive_seed(seed, purpose))


def draw_uint16(stream: np.random.SFC64, count: int) -> NDArray[np.uint16]:
    """Draws the next `count` uniform 16-bit integers; the rest of the last 64-bit output is dropped."""
    return _draw(stream, count, 16).view("<u2")[:count]


def draw_uint32(stream: np.random.SFC64, count: int) -> NDArray[np.uint32]:
    """Draws the next `count` uniform 32-bit integers; the rest of the last 64-bit output is dropped."""
    return _draw(stream, count, 32).view("<u4")[:count]


def draw_signs(stream: np.random.SFC64, count: int) -> NDArray[np.float32]:
    """Draws the next `count` uniform signs, -1 or +1; bit j of an output, from the lowest, is sign j: 0 is +1."""
    bits = np.unpackbits(_draw(stream, count, 1).view(np.uint8), bitorder="little")[:count]
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def _draw(stream: np.random.SFC64, count: int, bits: int) -> NDArray[np.uint64]:
    raw: NDArray[np.uint64] = stream.random_raw(-(-count * bits // _BITS_PER_RAW))
    return raw.astype("<u8", copy=False)
