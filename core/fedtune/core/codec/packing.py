"""Dense packing of ring words: ℓ bits a word, without padding between them.

The packed bytes are the little-endian digits of one big number, Σ_i words[i]·2^(i·ℓ), in ceil(count·ℓ/8) bytes. The
spare bits of the last byte are zero, and `unpack` checks this, so that one vector has exactly one packed form.

    data = pack(words, bits=11)
    words = unpack(data, bits=11, count=len(words))

64/gcd(ℓ, 64) consecutive words fill a whole number of 64-bit limbs: a *group*. Groups are handled side by side, one
word position at a time, in pieces small enough for the cache.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray

from fedtune.core.errors import PeerError

MAX_WORD_BITS = 64

_LIMB_BITS = 64
_PIECE_WORDS = 1 << 15  # 256 KiB of 64-bit words: stays in a core's second-level cache


def pack(words: NDArray[np.uint64] | NDArray[np.uint32], bits: int) -> bytes:
    """Writes each word with exactly `bits` bits.

    Args:
        words: shape (count,), every word below 2^bits.
        bits: the width ℓ, 1 to 64.

    Returns:
        `packed_size(count, bits)` bytes.

    Raises:
        ValueError: the width is out of range or a word does not fit in it.
    """
    _check_width(bits)
    if words.ndim != 1:
        raise ValueError(f"words must be one-dimensional, got shape {words.shape}")
    if words.size and int(words.max()) >> bits:
        raise ValueError(f"a word does not fit in {bits} bits: {int(words.max())}")
    group, limbs = _group(bits)
    packed = np.empty((-(-words.size // group), limbs), dtype="<u8")
    for start, stop in _pieces(len(packed), group):
        packed[start:stop] = _pack_groups(words[start * group : stop * group], bits, stop - start).T
    return packed.tobytes()[: packed_size(words.size, bits)]


def unpack(data: bytes | memoryview, bits: int, count: int) -> NDArray[np.uint32] | NDArray[np.uint64]:
    """Reads `count` words of `bits` bits: the inverse of `pack`.

    Returns:
        shape (count,), uint32 for widths up to 32 bits, otherwise uint64.

    Raises:
        ValueError: the width or the count is out of range.
        PeerError: the data has another size than `count` words take, or its spare bits are not zero.
    """
    _check_width(bits)
    size = packed_size(count, bits)
    if len(data) != size:
        raise PeerError(f"packed words: {count} words of {bits} bits take {size} bytes, got {len(data)}")
    spare = 8 * size - count * bits
    if spare and data[-1] >> (8 - spare):
        raise PeerError("packed words: the spare bits of the last byte are not zero")
    group, limbs = _group(bits)
    groups = -(-count // group)
    words: NDArray[np.uint32] | NDArray[np.uint64]
    words = np.empty(count, dtype=np.uint32) if bits <= 32 else np.empty(count, dtype=np.uint64)
    for start, stop in _pieces(groups, group):
        piece = np.zeros((stop - start) * limbs, dtype="<u8")
        raw = np.frombuffer(data, dtype=np.uint8)[start * limbs * 8 : stop * limbs * 8]
        piece.view(np.uint8)[: raw.size] = raw
        target = words[start * group : stop * group]
        target[:] = _unpack_groups(piece.reshape(-1, limbs), bits).T.reshape(-1)[: target.size]
    return words


def packed_size(count: int, bits: int) -> int:
    """Returns the size of `count` words of `bits` bits in bytes: ceil(count·bits/8)."""
    if count < 0:
        raise ValueError(f"a count of words cannot be negative: {count}")
    return -(-count * bits // 8)


def _check_width(bits: int) -> None:
    if not 1 <= bits <= MAX_WORD_BITS:
        raise ValueError(f"a word has 1 to {MAX_WORD_BITS} bits, got {bits}")


def _group(bits: int) -> tuple[int, int]:
    """Returns the smallest number of words that fills whole limbs, and how many limbs that is."""
    common = gcd(bits, _LIMB_BITS)
    return _LIMB_BITS // common, bits // common


def _pieces(groups: int, group: int) -> list[tuple[int, int]]:
    step = _PIECE_WORDS // group
    return [(start, min(start + step, groups)) for start in range(0, groups, step)]


def _pack_groups(words: NDArray[np.unsignedinteger], bits: int, groups: int) -> NDArray[np.uint64]:
    """Returns one row of limbs per limb position, one column per group; a short last group is padded with zeros."""
    group, limbs = _group(bits)
    rows = np.zeros((group, groups), dtype=np.uint64)
    whole = words.size // group
    rows[:, :whole] = words[: whole * group].reshape(whole, group).T
    rows[: words.size - whole * group, whole:] = words[whole * group :, None]
    packed = np.zeros((limbs, groups), dtype=np.uint64)
    for position, row in enumerate(rows):
        limb, shift = divmod(position * bits, _LIMB_BITS)
        packed[limb] |= row << np.uint64(shift)
        if shift + bits > _LIMB_BITS:
            packed[limb + 1] = row >> np.uint64(_LIMB_BITS - shift)
    return packed


def _unpack_groups(limbs: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Returns one row of words per position in the group, one column per group."""
    group, _ = _group(bits)
    rows = np.ascontiguousarray(limbs.T)
    mask = np.uint64((1 << bits) - 1)
    words = np.empty((group, limbs.shape[0]), dtype=np.uint64)
    for position in range(group):
        limb, shift = divmod(position * bits, _LIMB_BITS)
        word = rows[limb] >> np.uint64(shift)
        if shift + bits > _LIMB_BITS:
            word |= rows[limb + 1] << np.uint64(_LIMB_BITS - shift)
        words[position] = word & mask
    return words
