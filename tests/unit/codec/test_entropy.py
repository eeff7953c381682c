"""The level coder agrees with a slow reference, comes near the entropy, and codes every shape of levels."""

from __future__ import annotations

from collections import Counter
from math import log2
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.codec.entropy import CLASS_WAY_BITS, PIECE, decode_levels, encode_levels, max_coded_size
from fedtune.core.codec.quantization import MAX_LEVEL
from fedtune.core.codec.rans import MOST_STEPS, PRECISION, WAY_BITS, decode_symbols, encode_symbols, quantized
from fedtune.core.codec.wire import Reader
from fedtune.core.errors import PeerError

LEVELS = st.lists(
    st.one_of(st.just(0), st.integers(-3, 3), st.integers(-200, 200), st.integers(-MAX_LEVEL, MAX_LEVEL)), max_size=300
)


def roundtrip(levels: np.ndarray) -> np.ndarray:
    data = encode_levels(levels)
    assert len(data) <= max_coded_size(levels.size)
    reader = Reader(memoryview(data))
    decoded = decode_levels(reader, levels.size)
    reader.finish()
    return decoded


# A slow reference of one piece, from the format's description, symbol by symbol.


def reference_weight(code: int) -> int:
    return 0 if code == 0 else (16 + code % 16) << (code // 16)


def reference_table(symbols: list[int]) -> list[int]:
    counts = Counter(symbols)
    most, top = max(counts.values()), reference_weight(255)
    table = []
    for symbol in range(max(symbols) + 1):
        code = 0
        if counts[symbol]:
            wanted = counts[symbol] * (top / most)
            code = max([1] + [code for code in range(1, 256) if reference_weight(code) <= wanted])
        table.append(code)
    return table


def reference_bits(numbers: list[int], bits: int) -> bytes:
    total = sum(number << (position * bits) for position, number in enumerate(numbers))
    return total.to_bytes(-(-len(numbers) * bits // 8), "little")


def reference_frequencies(table: list[int]) -> list[int]:
    weights = [reference_weight(code) for code in table]
    scaled = [max(1, weight * 2**PRECISION // sum(weights)) if weight else 0 for weight in weights]
    scaled[scaled.index(max(scaled))] += 2**PRECISION - sum(scaled)
    return scaled


def reference_coder(
    symbols: list[tuple[int, list[int]]], raw: bytes, way_bits: float = WAY_BITS
) -> tuple[bytes, bytes]:
    """Returns the coded symbols, each with the frequencies of its model, by whole numbers, and the rest of `raw`."""
    bits = sum(PRECISION - log2(frequencies[symbol]) for symbol, frequencies in symbols)
    ways = max(1, int(bits / way_bits), -(-len(symbols) // MOST_STEPS))
    states = [65536 + int.from_bytes(raw[2 * way : 2 * way + 2], "little") for way in range(ways)]
    rows: list[list[int]] = []
    for start in reversed(range(0, len(symbols), ways)):
        row = []
        for way, (symbol, frequencies) in enumerate(symbols[start : start + ways]):
            frequency, before = frequencies[symbol], sum(frequencies[:symbol])
            if states[way] >= frequency << 32 - PRECISION:
                row.append(states[way] % 65536)
                states[way] //= 65536
            whole, rest = divmod(states[way], frequency)
            states[way] = (whole << PRECISION) + before + rest
        rows.append(row)
    words = [word for row in reversed(rows) for word in row]
    head = ways.to_bytes(2, "little") + reference_bits(states, 32)
    return head + len(words).to_bytes(3, "little") + reference_bits(words, 16), raw[2 * ways :]


def reference_encode(levels: list[int]) -> bytes:
    padded = [abs(level) for level in levels] + [0] * (-len(levels) % 128)
    blocks = [padded[start : start + 128] for start in range(0, len(padded), 128)]
    symbols = [[m if m < 16 else 16 + m.bit_length() - 5 for m in block] for block in blocks]
    classes = [sum(block).bit_length() for block in blocks]
    owned = {
        used: [symbol for block, owner in zip(symbols, classes, strict=True) if owner == used for symbol in block]
        for used in sorted(set(classes) - {0})
    }
    tables = [reference_table(classes), *(reference_table(group) for group in owned.values())]
    models = dict(zip(owned, map(reference_frequencies, tables[1:]), strict=True))
    coded = [
        (symbol, models[owner]) for block, owner in zip(symbols, classes, strict=True) if owner for symbol in block
    ]
    low = b""
    for bits in range(4, 25):
        low += reference_bits([m - (1 << bits) for m in padded if m >= 16 and m.bit_length() == bits + 1], bits)
    rest = reference_bits([int(level < 0) for level in levels if level], 1) + low
    first, rest = reference_coder(
        [(owner, reference_frequencies(tables[0])) for owner in classes], rest, CLASS_WAY_BITS
    )
    second, rest = reference_coder(coded, rest) if coded else (b"", rest)
    return b"".join([*(bytes([len(table), *table]) for table in tables), first, second, rest])


@settings(deadline=None)
@given(LEVELS.filter(bool))
def test_the_bytes_agree_with_the_slow_reference(levels: list[int]) -> None:
    assert encode_levels(np.array(levels, dtype=np.int32)) == reference_encode(levels)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1 << 20), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    st.integers(0, 3000),
    st.randoms(use_true_random=False),
)
def test_symbols_of_several_models_come_back_with_the_raw_bits(
    weights: list[list[int]], count: int, random: Random
) -> None:
    frequencies = np.array([quantized(np.array(row)) for row in weights])
    assert (frequencies.sum(axis=1) == 1 << PRECISION).all()
    models = np.array([random.randrange(len(weights)) for _ in range(count)], dtype=np.intp)
    present = [[symbol for symbol in range(3) if row[symbol]] for row in weights]
    symbols = np.array([random.choice(present[model]) for model in models], dtype=np.int64)
    raw = random.randbytes(random.randrange(20))
    coded, rest = encode_symbols(3 * models + symbols, frequencies, raw)
    reader = Reader(memoryview(coded))
    found, inside = decode_symbols(reader, models, frequencies)
    reader.finish()
    assert found.tolist() == symbols.tolist()
    assert (inside + rest)[: len(raw)] == raw
    assert not any((inside + rest)[len(raw) :])


def test_a_decoder_takes_few_steps_whoever_chose_the_bytes() -> None:
    frequencies = quantized(np.array([1]))[np.newaxis]
    one_way = (1).to_bytes(2, "little") + (65536).to_bytes(4, "little") + bytes(3)
    assert decode_symbols(Reader(memoryview(one_way)), np.zeros(MOST_STEPS, np.intp), frequencies)[0].any() == 0
    with pytest.raises(PeerError, match=f"1 ways for {MOST_STEPS + 1} symbols"):
        decode_symbols(Reader(memoryview(one_way)), np.zeros(MOST_STEPS + 1, np.intp), frequencies)


@settings(deadline=None)
@given(LEVELS)
def test_levels_survive(levels: list[int]) -> None:
    assert roundtrip(np.array(levels, dtype=np.int32)).tolist() == levels


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e5])
def test_vectors_of_several_pieces_survive(scale: float) -> None:
    levels = np.rint(np.random.default_rng(0).laplace(0, scale, 3 * PIECE + 17)).astype(np.int32)
    assert np.array_equal(roundtrip(levels), levels)


def test_nothing_but_zeros_costs_nothing_but_a_table() -> None:
    assert len(encode_levels(np.zeros(PIECE, dtype=np.int32))) < 32


def test_sparse_levels_cost_little_more_than_their_entropy() -> None:
    random = np.random.default_rng(0)
    magnitudes = np.where(random.random(200_000) < 0.1, random.geometric(0.5, 200_000), 0)
    levels = (magnitudes * random.choice([-1, 1], magnitudes.size)).astype(np.int32)
    shares = np.unique(levels, return_counts=True)[1] / levels.size
    bits = -sum(float(share) * log2(share) for share in shares) * levels.size
    assert 8 * len(encode_levels(levels)) < 1.02 * bits


def test_uneven_levels_cost_less_than_their_overall_entropy() -> None:
    random = np.random.default_rng(0)
    scale = np.repeat(np.exp(random.normal(0, 1.5, 200)), 1000)
    levels = np.rint(scale * random.laplace(0, 1, scale.size)).astype(np.int32)
    shares = np.unique(levels, return_counts=True)[1] / levels.size
    bits = -sum(float(share) * log2(share) for share in shares) * levels.size
    assert 8 * len(encode_levels(levels)) < 0.9 * bits


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80), st.integers(1, 300))
def test_arbitrary_bytes_decode_or_are_refused_with_a_reason(data: bytes, count: int) -> None:
    try:
        levels = decode_levels(Reader(memoryview(data)), count)
    except PeerError:
        return
    assert levels.shape == (count,)
    assert int(np.abs(levels).max()) <= MAX_LEVEL


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_bytes_decode_or_are_refused_with_a_reason(damage: list[tuple[int, int]]) -> None:
    levels = np.rint(np.random.default_rng(1).laplace(0, 8, 1000)).astype(np.int32)
    data = bytearray(encode_levels(levels))
    for position, value in damage:
        data[position % len(data)] = value
    try:
        decoded = decode_levels(Reader(memoryview(bytes(data))), levels.size)
    except PeerError:
        return
    assert int(np.abs(decoded).max()) <= MAX_LEVEL
