"""Packing agrees with one big Python integer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.codec.packing import pack, packed_size, unpack
from fedtune.core.errors import PeerError


@st.composite
def widths_and_words(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 64))
    return bits, draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=150))


@given(widths_and_words())
def test_packed_bytes_are_the_digits_of_one_big_number_and_unpack_to_the_same_words(
    case: tuple[int, list[int]],
) -> None:
    bits, words = case
    number = sum(word << (position * bits) for position, word in enumerate(words))
    expected = number.to_bytes(packed_size(len(words), bits), "little")

    assert pack(np.array(words, dtype=np.uint64), bits) == expected
    unpacked = unpack(expected, bits, len(words))
    assert unpacked.tolist() == words
    assert unpacked.dtype == (np.uint32 if bits <= 32 else np.uint64)


@pytest.mark.parametrize("bits", [1, 7, 8, 11, 24, 32])
def test_vectors_longer_than_a_piece_survive(bits: int) -> None:
    words = np.random.default_rng(bits).integers(0, 1 << bits, 100_003, dtype=np.uint32)
    assert np.array_equal(unpack(memoryview(pack(words, bits)), bits, words.size), words)


def test_a_word_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit in 3 bits: 8"):
        pack(np.array([1, 8], dtype=np.uint32), 3)


def test_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        pack(np.zeros((2, 2), dtype=np.uint32), 3)


@pytest.mark.parametrize("bits", [0, 65])
def test_a_width_out_of_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 bits"):
        pack(np.zeros(1, dtype=np.uint32), bits)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        unpack(b"", 3, -1)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_data_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(PeerError, match=f"3 words of 5 bits take 2 bytes, got {size}"):
        unpack(bytes(size), 5, 3)


def test_spare_bits_that_are_set_are_refused() -> None:
    with pytest.raises(PeerError, match="spare bits"):
        unpack(b"\x00\x80", 5, 3)
