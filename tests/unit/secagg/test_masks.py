"""Mask streams agree with a slow reference, look like noise, and cancel."""

from __future__ import annotations

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.secagg.masking import add_masks, pair_mask_keys, reduce, self_mask_key, word_type

KEYS = [bytes([value]) * 32 for value in range(1, 6)]


@pytest.mark.parametrize(("bits", "width"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (32, 4), (33, 8), (62, 8)])
def test_a_ring_is_worked_on_in_the_smallest_word_that_holds_it(bits: int, width: int) -> None:
    assert word_type(bits).itemsize == width


@settings(deadline=None)
@given(st.integers(1, 62), st.integers(0, 100), st.data())
def test_masking_is_the_sum_of_counter_mode_streams_modulo_the_ring(bits: int, count: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=count, max_size=count))
    words = np.array(values, dtype=word_type(bits))
    add_masks(words, KEYS[:2], KEYS[2:5])
    streams = [_reference_stream(key, count, words.dtype.itemsize) for key in KEYS]
    expected = [
        (value + streams[0][i] + streams[1][i] - streams[2][i] - streams[3][i] - streams[4][i]) % (1 << bits)
        for i, value in enumerate(values)
    ]
    assert reduce(words, bits).tolist() == expected


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4", "<u8"])
def test_masks_cancel_across_the_pieces_that_a_long_vector_is_worked_on_in(dtype: str) -> None:
    words = np.arange(300_001, dtype=np.dtype(dtype))
    masked = words.copy()
    add_masks(masked, KEYS[:3])
    assert not np.array_equal(masked, words)
    pieces = masked[:200_000].copy()
    add_masks(masked, subtracted=KEYS[:3])
    assert np.array_equal(masked, words)
    add_masks(pieces, subtracted=KEYS[:3])
    assert np.array_equal(pieces, words[:200_000])


@pytest.mark.parametrize("bits", [1, 5, 8, 11, 16, 20, 32])
def test_masked_words_are_uniform_by_a_chi_square_test(bits: int) -> None:
    words = np.zeros(1 << 18, dtype=word_type(bits))
    add_masks(words, [bytes(32)])
    cells = 1 << min(bits, 8)
    counts = np.bincount(reduce(words, bits) >> np.uint32(max(0, bits - 8)), minlength=cells)
    expected = words.size / cells
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = cells - 1
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)  # fixed key, so this either always holds or never


def test_streams_of_different_keys_share_nothing() -> None:
    streams = np.zeros((5, 4096), dtype="<u2")
    for row, key in zip(streams, KEYS, strict=True):
        add_masks(row, [key])
    for i in range(5):
        for j in range(i):
            assert np.count_nonzero(streams[i] == streams[j]) < 10  # 0.06 expected


def test_a_mask_key_is_bound_to_its_secret_round_client_indices_and_segment() -> None:
    own = [
        self_mask_key(seed, context, owner, segment)
        for seed in (b"b" * 32, b"c" * 32)
        for context in (b"round 1", b"round 2")
        for owner in (0, 1)
        for segment in (0, 1)
    ]
    pairs = [
        key
        for shared in (b"b" * 32, b"c" * 32)
        for context in (b"round 1", b"round 2")
        for pair in ((0, 1), (0, 2), (1, 2))
        for key in pair_mask_keys(shared, context, pair, [0, 1])
    ]
    assert len(set(own + pairs)) == len(own) + len(pairs)
    assert pair_mask_keys(b"s" * 32, b"c", (3, 1), [0]) == pair_mask_keys(b"s" * 32, b"c", (1, 3), [0])


def test_masking_leaves_the_neighbouring_memory_alone() -> None:
    memory = np.frombuffer(bytearray(os.urandom(64)), dtype="<u2").copy()
    before = memory.copy()
    add_masks(memory[8:16], KEYS)
    assert np.array_equal(memory[:8], before[:8])
    assert np.array_equal(memory[16:], before[16:])


def _reference_stream(key: bytes, count: int, width: int) -> list[int]:
    """Computes counter mode by hand: AES of 0, 1, 2 ... as 16 big-endian bytes, split into little-endian words."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(count * width // 16 + 1))
    return [int.from_bytes(stream[i * width : (i + 1) * width], "little") for i in range(count)]
