"""Masks: a key becomes a stream of uniform words, and streams are added to vectors in place.

A ring of ℓ bits is worked on in the smallest machine word of w >= ℓ bits (8, 16, 32 or 64). Reducing mod 2^w all along
and mod 2^ℓ once at the end is reducing mod 2^ℓ, and the low ℓ bits of a uniform w-bit word are uniform. So addition is
the machine's own, and a coordinate costs w/8 bytes of keystream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedtune.core.secagg.primitives import derive

Words = NDArray[np.unsignedinteger[Any]]

_PIECE_BYTES = 1 << 18  # keystream, zeros and vector piece together stay in a core's second-level cache
_BLOCK_BYTES = 16
_ZEROS = bytes(_PIECE_BYTES)
_FIRST_COUNTER = bytes(_BLOCK_BYTES)  # a mask key is used for one stream, so every stream starts at counter zero


def word_type(bits: int) -> np.dtype[Any]:
    """The little-endian unsigned machine word that holds a ring of `bits` bits."""
    return np.dtype(next(code for code, width in (("<u1", 8), ("<u2", 16), ("<u4", 32), ("<u8", 64)) if bits <= width))


def add_masks(words: Words, added: Iterable[bytes] = (), subtracted: Iterable[bytes] = ()) -> None:
    """words ← words + Σ PRG(k), k in `added`, − Σ PRG(k), k in `subtracted`, modulo 2^w, in place.

    PRG(k) is the AES-256-CTR keystream of k from counter 0 [NIST SP 800-38A], read as little-endian words.

    Args:
        words: shape (count,), a dtype of `word_type`.
        added, subtracted: 32-byte keys, none used for any other stream.
    """
    piece = _PIECE_BYTES // words.dtype.itemsize
    stream = np.empty(min(words.nbytes, _PIECE_BYTES) + _BLOCK_BYTES - 1, dtype=np.uint8)
    for keys, operation in ((added, np.add), (subtracted, np.subtract)):
        for key in keys:
            encryptor = Cipher(algorithms.AES(key), modes.CTR(_FIRST_COUNTER)).encryptor()
            for start in range(0, words.size, piece):
                target = words[start : start + piece]
                encryptor.update_into(memoryview(_ZEROS)[: target.nbytes], stream.data)
                operation(target, stream[: target.nbytes].view(words.dtype), out=target)
    stream.fill(0)


def reduce(words: Words, bits: int) -> NDArray[np.uint32] | NDArray[np.uint64]:
    """words mod 2^bits, as uint32 for rings up to 32 bits and uint64 above."""
    if bits <= 32:
        return words.astype(np.uint32) & np.uint32((1 << bits) - 1)
    return words.astype(np.uint64) & np.uint64((1 << bits) - 1)


def self_mask_key(seed: bytes, context: bytes, client_index: int, segment: int) -> bytes:
    """The key of PRG(b_i) on one segment: HKDF(b_i, salt = context, info = F("self mask", i, segment))."""
    return derive(seed, context, "self mask", client_index, segment)


def pair_mask_keys(shared: bytes, context: bytes, pair: tuple[int, int], segments: Iterable[int]) -> list[bytes]:
    """The keys of PRG(s_ij), one per segment: HKDF(DH, salt = context, info = F("pair mask", min, max, segment)).

    Both ends of the pair get the same keys. The smaller client index adds the stream and the greater one subtracts it.
    """
    return [derive(shared, context, "pair mask", min(pair), max(pair), segment) for segment in segments]
