"""The noised codec: the mean it gives, the noise that is in it, and the words that a single client sends."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from fedtune.core.codec.maskable import RingUpdate, RoundContext
from fedtune.core.codec.noised import NoisedCodec
from fedtune.core.errors import PeerError, RunError, UpdateError
from fedtune.core.privacy.discrete_gaussian import KEY_BYTES, KeyStream
from fedtune.core.privacy.guarantee import rho_of_sum

COUNT, CLIENTS, CLIP = 5000, 20, 0.3
CONTEXT = RoundContext(seed=7, count=COUNT, clip=CLIP, n_max=CLIENTS)


def update(seed: int, norm: float = CLIP) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(COUNT) + 1.0
    return (values * norm / np.linalg.norm(values)).astype(np.float32)


def total(codec: NoisedCodec, updates: list[np.ndarray]) -> RingUpdate:
    parts = [codec.encode(each, 2**200 + number, CONTEXT) for number, each in enumerate(updates)]
    summed = parts[0]
    for part in parts[1:]:
        summed = codec.add(summed, part, CONTEXT)
    return summed


@pytest.mark.parametrize("rho", [0.2, 5.0])
@pytest.mark.parametrize("central", [False, True])
def test_the_noise_of_a_sum_is_what_its_rho_needs(rho: float, central: bool) -> None:
    codec = NoisedCodec(rho, 0 if central else CLIENTS)
    updates = [update(seed) for seed in range(CLIENTS)]
    summed = total(codec, updates)
    if central:
        summed = codec.add(summed, codec.own_noise(KeyStream(b"n" * KEY_BYTES), CONTEXT), CONTEXT)
    noise, mean = codec.noise(CONTEXT), np.mean(updates, axis=0)
    error = codec.decode_sum(summed, CLIENTS, CONTEXT).update - mean
    variance = noise.variance.value * (1 if central else CLIENTS)
    step = CLIP / noise.norm / CLIENTS
    least, most = step * sqrt(variance), step * sqrt(variance + CLIENTS / 4)
    assert 0.95 * least < error.std() < 1.05 * most
    assert abs(error.mean()) < 5 * most / sqrt(COUNT)
    assert rho_of_sum(noise.longest, variance, 1, codec.word_count(CONTEXT)) <= rho * (1 + 1e-9)


def test_noise_by_devices_and_by_the_server_are_the_same_in_all() -> None:
    apart, whole = NoisedCodec(1.0, CLIENTS).noise(CONTEXT), NoisedCodec(1.0, 0).noise(CONTEXT)
    shares = [CLIENTS * apart.variance.value / apart.norm**2, whole.variance.value / whole.norm**2]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


def test_no_word_of_a_client_tells_what_it_is_made_of() -> None:
    codec = NoisedCodec(0.2, 3)
    assert codec.encode(update(1), 5, CONTEXT).auxiliary.size == 0
    first, again, other = (codec.encode(update(1), seed, CONTEXT).words for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert int(max(first.max(), other.max())) < 1 << codec.width(CONTEXT)


def test_an_update_beyond_the_clip_counts_as_one_of_its_norm() -> None:
    codec = NoisedCodec(1e4, CLIENTS)  # hardly any noise
    long = codec.decode_sum(total(codec, [update(1, 50.0)] * CLIENTS), CLIENTS, CONTEXT).update
    assert np.linalg.norm(long) == pytest.approx(CLIP, rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    codec = NoisedCodec(1.0, CLIENTS)
    summed = total(codec, [update(1)])
    with pytest.raises(RunError, match="1 to 20 survivors"):
        codec.decode_sum(summed, 0, CONTEXT)
    with pytest.raises(PeerError, match="a noised sum of"):
        codec.decode_sum(RingUpdate(summed.words[1:], summed.auxiliary), 1, CONTEXT)
    with pytest.raises(UpdateError, match="has 5000 coordinates"):
        codec.encode(update(1)[1:], 1, CONTEXT)
    with pytest.raises(UpdateError, match="NaN"):
        codec.encode(np.full(COUNT, np.nan, dtype=np.float32), 1, CONTEXT)
