"""Codecs in the clear: round trips, losses, and refusals of every kind of invalid payload."""

from __future__ import annotations

import struct
from collections.abc import Callable
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedtune.core.codec import DenseCodec, ExactCodec, SparseCodec, select_largest
from fedtune.core.codec.dense import max_dense_size
from fedtune.core.codec.entropy import encode_levels
from fedtune.core.codec.sparse import max_levels_size
from fedtune.core.codec.wire import FRAME_SIZE, Kind, frame
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.seeds import derive_seed

COUNT = 1000
SPARSE = SparseCodec(density=0.1, bits=4)


class Seeded(DenseCodec):
    """The dense codec with one seed for all updates."""

    def encode(self, update: np.ndarray, seed: int = 7) -> bytes:
        return super().encode(update, seed)


DENSE = Seeded(bits=3)
Codec = ExactCodec | SparseCodec | Seeded
CODECS = [ExactCodec(), SPARSE, DENSE]
ORDINARY = st.floats(-(2.0**60), 2.0**60, width=32)


def vector_of(count: int, seed: int = 0) -> np.ndarray:
    return (1e-3 * np.random.default_rng(seed).standard_t(4, count)).astype(np.float32)


@given(
    npst.arrays(np.float32, st.integers(0, 300), elements=st.floats(allow_nan=False, allow_infinity=False, width=32))
)
def test_the_exact_codec_loses_nothing(update: np.ndarray) -> None:
    decoded = ExactCodec().decode(ExactCodec().encode(update), update.size)
    assert np.array_equal(decoded.view(np.uint32), update.view(np.uint32))


@settings(deadline=None)
@given(npst.arrays(np.float32, st.integers(0, 300), elements=ORDINARY), st.floats(0.01, 1.0), st.integers(2, 8))
def test_the_sparse_codec_sends_the_largest_within_half_a_step_and_the_others_not_at_all(
    update: np.ndarray, density: float, bits: int
) -> None:
    decoded = SparseCodec(density, bits).decode(SparseCodec(density, bits).encode(update), update.size)
    sent = select_largest(update, density)
    assert not decoded[~sent].any()
    if sent.any():
        deviation = float(np.sqrt(np.mean(np.square(update[sent], dtype=np.float64))))
        step = max(6 * deviation / (2**bits - 1), 2.0**-100)
        error = np.abs(decoded[sent].astype(np.float64) - update[sent])
        assert error.max() <= step * 0.5001


def slow_sparse_values(update: list[float], density: float, bits: int) -> list[float]:
    """Computes selection, step and rounding in plain Python, from the formulas."""
    wanted = -(-len(update) * round(density * 10) // 10)
    kept = set(sorted(range(len(update)), key=lambda position: (-abs(update[position]), position))[:wanted])
    deviation = (sum(update[position] ** 2 for position in kept) / wanted) ** 0.5
    step = float(np.float32(6 * deviation / (2**bits - 1)))
    levels = [
        round(float(np.float32(value / step))) if position in kept else 0 for position, value in enumerate(update)
    ]
    return [float(np.float32(level * step)) for level in levels]


@settings(deadline=None)
@given(st.integers(1, 400), st.sampled_from([0.1, 0.5, 1.0]), st.integers(2, 8), st.integers(0, 1000))
def test_the_sparse_codec_agrees_bit_for_bit_with_a_slow_reference(
    count: int, density: float, bits: int, seed: int
) -> None:
    update, codec = vector_of(count, seed), SparseCodec(density, bits)
    expected = slow_sparse_values(update.tolist(), density, bits)
    assert codec.decode(codec.encode(update), count).tolist() == expected


def test_a_tenth_at_four_bits_takes_less_than_a_bit_per_coordinate() -> None:
    update = vector_of(166_000)
    assert 8 * len(SparseCodec(density=0.1, bits=4).encode(update)) < 0.87 * update.size


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    for codec in (SparseCodec(density=0.1, bits=bits), Seeded(bits)):
        with pytest.raises(ValueError, match="2 to 8"):
            codec.encode(vector_of(COUNT))


def slow_dense_values(update: list[float], bits: int, seed: int) -> list[float]:
    """Computes step, dither and rounding in plain Python, from the formulas."""
    deviation = (sum(value**2 for value in update) / len(update)) ** 0.5
    step = float(np.float32(6 * deviation / (2**bits - 1)))
    stream, dither = np.random.SFC64(derive_seed(seed, "dither")), list[float]()
    while len(dither) < len(update):
        word = int(stream.random_raw())
        dither += [(word >> shift & 0xFFFF) / 65536 - 0.5 for shift in (0, 16, 32, 48)]
    levels = [
        round(float(np.float32(np.float32(value / step) + np.float32(shift))))
        for value, shift in zip(update, dither, strict=False)
    ]
    shifted = [float(np.float32(level - shift)) for level, shift in zip(levels, dither, strict=False)]
    return [float(np.float32(value * step)) for value in shifted]


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(2, 8), st.integers(0, (1 << 63) - 1))
def test_the_dense_codec_agrees_bit_for_bit_with_a_slow_reference(count: int, bits: int, seed: int) -> None:
    update, codec = vector_of(count, seed % 1000), DenseCodec(bits)
    assert codec.decode(codec.encode(update, seed), count).tolist() == slow_dense_values(update.tolist(), bits, seed)


@settings(deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 300), elements=ORDINARY), st.integers(2, 8), st.integers(0, 1 << 62))
def test_the_dense_codec_sends_every_value_within_half_a_step(update: np.ndarray, bits: int, seed: int) -> None:
    decoded = DenseCodec(bits).decode(DenseCodec(bits).encode(update, seed), update.size)
    deviation = float(np.sqrt(np.mean(np.square(update, dtype=np.float64))))
    step = max(6 * deviation / (2**bits - 1), 2.0**-100)
    assert np.abs(decoded.astype(np.float64) - update).max() <= step * 0.5001


def test_the_dense_codec_s_error_is_uniform_and_does_not_depend_on_the_value() -> None:
    update = vector_of(100_000)
    error = DENSE.decode(DENSE.encode(update), update.size) - update
    step = 6 / 7 * float(np.sqrt(np.mean(update**2)))
    assert float(np.mean(error**2)) == pytest.approx(step**2 / 12, rel=0.02)
    assert abs(float(np.corrcoef(error, update)[0, 1])) < 0.01
    small = np.abs(update) < step / 8
    assert float(np.mean(error[small] ** 2)) == pytest.approx(step**2 / 12, rel=0.04)


def test_the_dense_codec_takes_little_more_than_two_bits_a_value_at_three_bits_of_resolution() -> None:
    update = vector_of(166_000)
    assert 8 * len(DENSE.encode(update)) < 2.3 * update.size


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_update_that_is_accepted_comes_back_finite(codec: Codec) -> None:
    update = np.array([2.0**100], dtype=np.float32)
    assert np.isfinite(codec.decode(codec.encode(update), 1)).all()


def test_the_same_update_has_the_same_bytes() -> None:
    assert SPARSE.encode(vector_of(COUNT)) == SPARSE.encode(vector_of(COUNT))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused_on_the_device(codec: Codec, bad: float) -> None:
    update = vector_of(COUNT)
    update[7] = bad
    with pytest.raises(UpdateError, match="first at position 7"):
        codec.encode(update)


def test_an_absurd_update_is_refused_on_the_device() -> None:
    with pytest.raises(UpdateError, match="at most"):
        SPARSE.encode(np.full(10, 3e38, dtype=np.float32))


def resealed(data: bytes, position: int, value: bytes) -> bytes:
    """Returns the payload with some bytes replaced and a valid checksum."""
    changed = data[:position] + value + data[position + len(value) :]
    return changed[:12] + struct.pack("<I", crc32(changed[16:], crc32(changed[:12]))) + changed[16:]


WRONGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("truncated", lambda data: data[:10]),
    ("truncated", lambda data: data[:0]),
    ("claims", lambda data: data[:-1]),
    ("claims|at most", lambda data: data + b"\0"),
    ("checksum", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ("checksum", lambda data: data[:12] + b"\0\0\0\0" + data[16:]),
    ("not an update", lambda data: resealed(data, 0, b"PK")),
    ("version 9", lambda data: resealed(data, 2, b"\x09")),
    ("kind 77", lambda data: resealed(data, 3, b"\x4d")),
    ("kind 3", lambda data: resealed(data, 3, bytes([Kind.DELTA]))),
    ("for a segment of 999 coordinates, this one has 1000", lambda data: resealed(data, 4, struct.pack("<I", 999))),
    ("claims 4294967295 bytes", lambda data: resealed(data, 8, b"\xff\xff\xff\xff")),
    ("at most", lambda data: data + bytes(20 * COUNT)),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("reason", "spoil"), WRONGS)
def test_a_spoilt_payload_is_refused_with_the_reason(
    codec: Codec, reason: str, spoil: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(PeerError, match=reason):
        codec.decode(spoil(codec.encode(vector_of(COUNT))), COUNT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_exact_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(PeerError, match="NaN or infinity"):
        ExactCodec().decode(frame(Kind.EXACT, 3, np.array([0, value, 0], dtype="<f4").tobytes()), 3)


def test_an_exact_body_of_another_size_is_refused() -> None:
    with pytest.raises(PeerError, match="take 12 bytes, got 8"):
        ExactCodec().decode(frame(Kind.EXACT, 3, bytes(8)), 3)


@pytest.mark.parametrize("step", [np.nan, np.inf, 3e38, 0.0, -1.0, 1e-40])
def test_a_step_that_would_not_decode_to_finite_values_is_refused(step: float) -> None:
    body = struct.pack("<f", step) + encode_levels(np.ones(COUNT, dtype=np.int32))
    with pytest.raises(PeerError, match="step"):
        SPARSE.decode(frame(Kind.SPARSE, COUNT, body), COUNT)
    with pytest.raises(PeerError, match="step"):
        DENSE.decode(frame(Kind.DENSE, COUNT, body[:4] + bytes(8) + body[4:]), COUNT)


def test_bytes_after_the_levels_are_refused() -> None:
    body = struct.pack("<f", 1.0) + encode_levels(np.ones(COUNT, dtype=np.int32)) + b"\0"
    with pytest.raises(PeerError, match="1 bytes too many"):
        SPARSE.decode(frame(Kind.SPARSE, COUNT, body), COUNT)
    with pytest.raises(PeerError, match="1 bytes too many"):
        DENSE.decode(frame(Kind.DENSE, COUNT, body[:4] + bytes(8) + body[4:]), COUNT)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.sampled_from([(SPARSE, Kind.SPARSE), (DENSE, Kind.DENSE)]))
def test_well_framed_rubbish_is_refused_or_decodes_to_finite_values(body: bytes, which: tuple[Codec, Kind]) -> None:
    codec, kind = which
    try:
        decoded = codec.decode(frame(kind, COUNT, body), COUNT)
    except PeerError:
        return
    assert np.isfinite(decoded).all()


def test_honest_payloads_stay_below_the_bound_that_refuses_oversized_ones() -> None:
    worst = np.random.default_rng(0).integers(-(2**24), 2**24, COUNT).astype(np.int32)
    assert len(encode_levels(worst)) + 4 <= max_levels_size(COUNT)
    assert len(encode_levels(worst)) + 4 + 8 <= max_dense_size(COUNT)
    assert len(ExactCodec().encode(vector_of(COUNT))) == FRAME_SIZE + 4 * COUNT
