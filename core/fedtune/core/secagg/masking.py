"""Masks: keys are expanded to streams of uniform words, which are added to vectors in place.

    client   y_i = u_i + PRG(b_i) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij)                 j in U2, partners of i
    server   Σ_{i∈U3} u_i = Σ_{i∈U3} (y_i − PRG(b_i)) − Σ_{i∈U3} Σ_{j∈U2∖U3} ± PRG(s_ij)   the sign i gave it

A ring of ℓ bits uses the smallest machine word of w >= ℓ bits (8, 16, 32 or 64). To reduce mod 2^w after each addition
and mod 2^ℓ once at the end is to reduce mod 2^ℓ, and the low ℓ bits of a uniform w-bit word are uniform. So machine
addition is enough, and a coordinate costs w/8 bytes of keystream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedtune.core.secagg.config import segments_of
from fedtune.core.secagg.primitives import derive
from fedtune.core.secagg.transcript import Transcript, mask_agreement

Words = NDArray[np.unsignedinteger[Any]]

_PIECE_BYTES = 1 << 18  # keystream, zeros and vector piece together stay in a core's second-level cache
_BLOCK_BYTES = 16
_ZEROS = bytes(_PIECE_BYTES)
_FIRST_COUNTER = bytes(_BLOCK_BYTES)  # a mask key is used for one stream, so every stream starts at counter zero


def mask_update(
    words: Mapping[int, Words],
    transcript: Transcript,
    own: int,
    sharers: Set[int],
    seeds: tuple[bytes, bytes],
) -> None:
    """Masks one client's update in place.

    Args:
        words: machine words by segment index, for the segments of the client's tier.
        transcript: transcript of the round.
        own: index of the client.
        sharers: U2.
        seeds: b and σ of the client.

    Raises:
        ValueError: a partner's mask key is of small order.
    """
    self_seed, mask_seed = seeds
    added = {segment: [self_mask_key(self_seed, transcript.salt, own, segment)] for segment in words}
    subtracted: dict[int, list[bytes]] = {segment: [] for segment in words}
    for partner, keys in _pair_keys(transcript, own, mask_seed, sharers).items():
        for segment, key in keys.items():
            (added if own < partner else subtracted)[segment].append(key)
    for segment, masked in words.items():
        add_masks(masked, added[segment], subtracted[segment])


def unmask_sums(
    sums: Mapping[int, Words],
    transcript: Transcript,
    survivors: Set[int],
    seeds: Mapping[int, bytes],
) -> None:
    """Unmasks the sums over the survivors in place.

    Args:
        sums: machine words by segment index, Σ y_i over the survivors that carry the segment.
        survivors: U3.
        transcript: transcript of the round.
        seeds: for every client in U2, by index: b if it survived, else σ.
    """
    added: dict[int, list[bytes]] = {segment: [] for segment in sums}
    subtracted: dict[int, list[bytes]] = {segment: [] for segment in sums}
    for owner, seed in seeds.items():
        if owner in survivors:
            for segment in segments_of(transcript.config, owner):
                subtracted[segment].append(self_mask_key(seed, transcript.salt, owner, segment))
            continue
        for partner, keys in _pair_keys(transcript, owner, seed, survivors).items():
            for segment, key in keys.items():
                (subtracted if partner < owner else added)[segment].append(key)
    for segment, words in sums.items():
        add_masks(words, added[segment], subtracted[segment])


def word_type(bits: int) -> np.dtype[Any]:
    """Returns the little-endian unsigned machine word that holds a ring of `bits` bits."""
    return np.dtype(next(code for code, width in (("<u1", 8), ("<u2", 16), ("<u4", 32), ("<u8", 64)) if bits <= width))


def add_masks(words: Words, added: Iterable[bytes] = (), subtracted: Iterable[bytes] = ()) -> None:
    """Sets words ← words + Σ PRG(k), k in `added`, − Σ PRG(k), k in `subtracted`, modulo 2^w, in place.

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
    """Returns words mod 2^bits, as uint32 for rings up to 32 bits and uint64 above."""
    if bits <= 32:
        return words.astype(np.uint32) & np.uint32((1 << bits) - 1)
    return words.astype(np.uint64) & np.uint64((1 << bits) - 1)


def self_mask_key(seed: bytes, salt: bytes, owner: int, segment: int) -> bytes:
    """Returns the key of PRG(b_i) on one segment: HKDF(b_i, salt, info = F("self mask", i, segment))."""
    return derive(seed, salt, "self mask", owner, segment)


def pair_mask_keys(shared: bytes, salt: bytes, pair: tuple[int, int], segments: Iterable[int]) -> list[bytes]:
    """Returns the keys of PRG(s_ij), one per segment: HKDF(DH, salt, info = F("pair mask", min, max, segment)).

    Both ends of the pair get the same keys. The client with the smaller index adds the stream, the other subtracts it.
    """
    return [derive(shared, salt, "pair mask", min(pair), max(pair), segment) for segment in segments]


def _pair_keys(transcript: Transcript, own: int, mask_seed: bytes, others: Set[int]) -> dict[int, dict[int, bytes]]:
    """Returns the keys of one client's pairwise masks, by partner among `others` and by segment index."""
    agree = mask_agreement(mask_seed)
    partners = {segment: transcript.partners(own, segment) & others for segment in segments_of(transcript.config, own)}
    keys = {}
    for partner in sorted(frozenset().union(*partners.values())):
        common = [segment for segment in partners if partner in partners[segment]]
        shared = agree(transcript.keys[partner].mask_key)
        pair = pair_mask_keys(shared, transcript.salt, (own, partner), common)
        keys[partner] = dict(zip(common, pair, strict=True))
    return keys
