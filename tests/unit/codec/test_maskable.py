"""The maskable codec agrees with a slow reference, is linear in the ring, and refuses invalid sums."""

from __future__ import annotations

import struct
from math import fsum, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.codec import MaskableCodec, RingUpdate, RoundContext
from fedtune.core.codec.quantization import public_range
from fedtune.core.codec.rotation import unrotate
from fedtune.core.errors import JobError, PeerError, RunError, UpdateError
from fedtune.core.seeds import derive_seed

BITS = st.integers(1, 8)
COUNTS = st.sampled_from([0, 1, 2, 3, 31, 33, 64, 100, 257, 1000, 1025, 2100])


def context_of(count: int, clip: float = 1.0, n_max: int = 20, rotation: bool = True) -> RoundContext:
    return RoundContext(5, count, clip, n_max, rotation)


def alone(codec: MaskableCodec, contribution: RingUpdate, context: RoundContext) -> np.ndarray:
    """Returns the update that one contribution decodes to."""
    return codec.decode_sum(contribution, 1, context).update


def vector_of(count: int, seed: int, scale: float = 0.05) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_t(3, count)).astype(np.float32)


# A slow reference, written from the formulas: Python numbers, one coordinate at a time, rounded to float32 where the
# format says so. Only the raw random outputs come from numpy.


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def raw_bits(seed: int, purpose: str) -> np.random.SFC64:
    return np.random.SFC64(derive_seed(seed, purpose))


def reference_block(count: int) -> int:
    block = 1024
    while block > 1 and (block - count % block) % block > count / 32:
        block //= 2
    return block


def reference_rotate(values: list[float], seed: int) -> list[float]:
    block = reference_block(len(values))
    padded = values + [0.0] * ((block - len(values) % block) % block)
    columns = len(padded) // block
    stream = raw_bits(seed, "rotation")
    signs: list[float] = []
    while len(signs) < block:
        word = int(stream.random_raw())
        signs += [-1.0 if word >> position & 1 else 1.0 for position in range(64)]
    scale = f32(1 / sqrt(block))
    rotated = [0.0] * len(padded)
    for column in range(columns):
        work = [f32(padded[row * columns + column] * f32(signs[row] * scale)) for row in range(block)]
        distance = 1
        while distance < block:
            work = [
                f32(work[row] + work[row + distance]) if row & distance == 0 else f32(work[row - distance] - work[row])
                for row in range(block)
            ]
            distance *= 2
        for row in range(block):
            rotated[row * columns + column] = work[row]
    return rotated


def reference_encode(update: list[float], private_seed: int, context: RoundContext, bits: int) -> list[int]:
    norm = sqrt(fsum(value * value for value in update))
    clip_factor = 1.0 if norm <= context.clip else context.clip / norm
    factor = f32(clip_factor)
    rotated = [f32(value * factor) for value in update]
    if context.rotation:
        rotated = reference_rotate(rotated, context.seed)
    width = (context.n_max * (2**bits - 1)).bit_length()
    levels = (2**width - 1) // context.n_max
    bound = max(1.0, sqrt(log(context.n_max * levels**2)) - 0.5) * context.clip / sqrt(max(len(rotated), 1))
    scale, middle = f32(levels * 65536 / (2 * bound)), f32(levels * 65536 / 2)
    stream = raw_bits(private_seed, "dither")
    dither: list[int] = []
    while len(dither) < len(rotated):
        word = int(stream.random_raw())
        dither += [word >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    fixed = [min(max(f32(f32(value * scale) + middle), 0.0), levels * 65536.0) for value in rotated]
    return [(int(value) + extra) >> 16 for value, extra in zip(fixed, dither, strict=False)]


@settings(deadline=None, max_examples=60)
@given(
    COUNTS,
    BITS,
    st.integers(1, 100),
    st.sampled_from([0.01, 1.0, 1e6]),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_words_agree_bit_for_bit_with_the_slow_reference(
    count: int, bits: int, n_max: int, clip: float, rotation: bool, seed: int
) -> None:
    context = context_of(count, clip, n_max, rotation)
    update = vector_of(count, seed)
    private_seed = seed
    words = MaskableCodec(bits).encode(update, private_seed, context).words
    assert words.tolist() == reference_encode(update.tolist(), private_seed, context, bits)


@pytest.mark.parametrize("rotation", [True, False])
def test_words_agree_with_the_reference_where_a_vector_spans_many_pieces(rotation: bool) -> None:
    context = context_of(70_000, rotation=rotation)
    update = vector_of(70_000, 1)
    words = MaskableCodec(4).encode(update, 11, context).words
    assert words.tolist() == reference_encode(update.tolist(), 11, context, 4)


@settings(deadline=None)
@given(COUNTS, BITS, st.integers(1, 20), st.booleans(), st.integers(0, 1 << 30))
def test_the_sum_in_the_ring_is_the_plain_sum_and_decodes_to_the_mean_of_what_each_client_sent(
    count: int, bits: int, clients: int, rotation: bool, seed: int
) -> None:
    codec, context = MaskableCodec(bits), context_of(count, rotation=rotation)
    contributions = [codec.encode(vector_of(count, seed + client), client, context) for client in range(clients)]
    total = codec.zero(context)
    for contribution in contributions:
        total = codec.add(total, contribution, context)
    assert total.words.tolist() == np.sum([contribution.words for contribution in contributions], axis=0).tolist()

    expected = np.mean([sent(codec, contribution, context) for contribution in contributions], axis=0)
    expected *= min(1.0, codec.longest_mean(clients, context) / max(float(np.linalg.norm(expected)), 1e-30))
    if rotation:
        expected = unrotate(expected.astype(np.float32), count, context.seed)
    np.testing.assert_allclose(codec.decode_sum(total, clients, context).update, expected, atol=1e-4)


def sent(codec: MaskableCodec, contribution: RingUpdate, context: RoundContext) -> np.ndarray:
    """Returns the rotated values that a contribution's words stand for: δ·u - R."""
    levels = codec.ring(context).levels
    bound = public_range(context.clip, contribution.words.size, levels, context.n_max)
    return (2 * contribution.words.astype(np.float64) / levels - 1) * bound


def test_the_mean_is_close_to_the_true_mean() -> None:
    codec, context = MaskableCodec(8), context_of(3000, clip=8.0)
    updates = [vector_of(3000, client) for client in range(20)]
    total = codec.zero(context)
    for client, update in enumerate(updates):
        total = codec.add(total, codec.encode(update, client, context), context)
    mean = codec.decode_sum(total, 20, context)
    truth = np.mean(updates, axis=0)
    assert np.linalg.norm(mean.update - truth) < 0.05 * np.linalg.norm(truth)
    assert mean.mean_norm == pytest.approx(np.mean([np.linalg.norm(update) for update in updates]), rel=1e-3)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_means_of_honest_updates_as_long_as_the_clip_are_hardly_shortened(bits: int) -> None:
    codec, context = MaskableCodec(bits), context_of(3000, clip=1.0, n_max=10)
    update = vector_of(3000, 0)
    update /= np.float32(np.linalg.norm(update))
    total = codec.zero(context)
    for client in range(10):
        total = codec.add(total, codec.encode(update, client, context), context)
    bounded = codec.decode_sum(total, 10, context).update
    levels, words = codec.ring(context).levels, total.words.astype(np.float64)
    plain = (2 * words / levels - 10) / 10 * public_range(1.0, words.size, levels, 10)
    unbounded = unrotate(plain.astype(np.float32), 3000, context.seed)
    assert float(bounded @ update) > 0.98 * float(unbounded @ update)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_no_words_of_one_client_make_a_mean_longer_than_honest_ones_can_be(bits: int) -> None:
    codec, context = MaskableCodec(bits), context_of(3000, clip=1.0, n_max=10)
    total = codec.zero(context)
    for client in range(9):
        total = codec.add(total, codec.encode(vector_of(3000, client, scale=0.01), client, context), context)
    top = 10 * codec.ring(context).levels  # what the sum of ten may be at most: under masks a client reaches it
    goal = np.random.default_rng(5).choice([0, top], total.words.size).astype(np.uint32)
    hostile = RingUpdate((goal - total.words) & np.uint32((1 << codec.ring(context).width) - 1), total.auxiliary)
    mean = codec.decode_sum(codec.add(total, hostile, context), 10, context)
    limit = codec.longest_mean(10, context)
    assert np.linalg.norm(mean.update) <= limit * (1 + 1e-5)
    assert limit < 1.3


def test_without_rotation_nothing_is_padded_and_one_large_value_is_cut_at_the_range() -> None:
    codec, update = MaskableCodec(4), np.zeros(1000, dtype=np.float32)
    update[500] = 1.0
    plain, rotated = (context_of(1000, rotation=rotation) for rotation in (False, True))
    assert codec.word_count(plain) == 1000 < codec.word_count(rotated)
    taken = [alone(codec, codec.encode(update, 11, context), context) for context in (plain, rotated)]
    bound = (sqrt(log(20 * codec.ring(plain).levels ** 2)) - 0.5) / sqrt(1000)
    assert np.abs(taken[0]).max() == pytest.approx(bound)
    assert taken[1][500] == pytest.approx(1.0, abs=0.2)


def test_an_update_beyond_the_clip_is_shortened_to_it_and_its_norm_counts_as_at_most_four_clips() -> None:
    codec, context = MaskableCodec(8), context_of(3000, clip=1.0)
    contribution = codec.encode(vector_of(3000, 0, scale=1.0), 11, context)
    assert contribution.auxiliary.tolist() == [65536]
    assert np.linalg.norm(alone(codec, contribution, context)) == pytest.approx(1.0, rel=0.01)


def test_extreme_values_stay_in_the_ring() -> None:
    codec, context = MaskableCodec(8), context_of(100)
    update = np.full(100, 1e29, dtype=np.float32)
    update[::2] = -1e-45
    assert codec.encode(update, 11, context).words.max() <= 409


def test_two_clients_round_differently_and_one_client_repeats_itself() -> None:
    codec, context, update = MaskableCodec(2), context_of(1000), vector_of(1000, 0)
    first = codec.encode(update, 1, context).words
    assert np.array_equal(first, codec.encode(update, 1, context).words)
    assert not np.array_equal(first, codec.encode(update, 2, context).words)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_an_update_that_is_not_finite_or_absurd_is_refused_on_the_device(bad: float) -> None:
    update = np.zeros(100, dtype=np.float32)
    update[41] = bad
    with pytest.raises(UpdateError, match=r"position 41|at most"):
        MaskableCodec(4).encode(update, 11, context_of(100))


def test_an_update_of_another_size_or_type_is_refused() -> None:
    with pytest.raises(UpdateError, match="100 coordinates, the update has 99"):
        MaskableCodec(4).encode(np.zeros(99, dtype=np.float32), 11, context_of(100))
    with pytest.raises(UpdateError, match="float64"):
        MaskableCodec(4).encode(np.zeros(100), 11, context_of(100))  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan, np.inf, 1e-300])
def test_a_clip_that_no_update_could_have_is_refused(clip: float) -> None:
    with pytest.raises(PeerError, match="clip"):
        context_of(100, clip=clip)


def test_a_ring_that_cannot_exist_is_refused_before_anything_is_encoded() -> None:
    with pytest.raises(JobError, match="clients"):
        MaskableCodec(4).encode(np.zeros(10, dtype=np.float32), 11, context_of(10, n_max=1 << 20))


def test_sums_that_cannot_be_are_refused() -> None:
    codec, context = MaskableCodec(4), context_of(100)
    good = codec.encode(vector_of(100, 0), 11, context)
    with pytest.raises(PeerError, match="100 words"):
        codec.decode_sum(RingUpdate(good.words[1:], good.auxiliary), 1, context)
    with pytest.raises(PeerError, match="the masks did not cancel"):
        codec.decode_sum(RingUpdate(good.words + np.uint32(26), good.auxiliary), 1, context)
    with pytest.raises(PeerError, match="an auxiliary sum of 1 client "):
        codec.decode_sum(RingUpdate(good.words, good.auxiliary + np.uint32(65536)), 1, context)
    with pytest.raises(RunError, match="survivors"):
        codec.decode_sum(good, 21, context)
