"""The overflow proof, checked on extreme inputs."""

from __future__ import annotations

from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedtune.core.codec.quantization import dequantize_sum, quantize
from fedtune.core.codec.ring import AUXILIARY_ONE, MAX_COHORT, Ring, auxiliary_total, norm_word
from fedtune.core.errors import JobError, PeerError, RunError

EXTREMES = np.array([3.4e38, -3.4e38, 1.0, -1.0, 1.0000001, 0.99999994, 0.0, -0.0, 1e-45], dtype=np.float32)


@given(st.integers(1, 8), st.integers(1, MAX_COHORT))
def test_the_width_is_the_smallest_that_holds_the_largest_sum(bits: int, n_max: int) -> None:
    ring = Ring(bits, n_max)
    assert ring.width == ceil(log2(n_max * (2**bits - 1) + 1))
    assert 2**bits - 1 <= ring.levels < 2 ** (bits + 1)
    assert n_max * ring.levels < 2**ring.width <= n_max * (ring.levels + 1)
    assert ring.width <= 32


@given(st.integers(1, 511), st.integers(0, 1 << 62))
def test_no_word_exceeds_the_levels_whatever_the_input(levels: int, seed: int) -> None:
    values = np.tile(EXTREMES, 500)
    with np.errstate(over="ignore"):
        words = quantize(values, 1.0, levels, seed)
    assert words.max() == levels


@pytest.mark.parametrize(("bits", "n_max"), [(4, 17), (1, 1), (8, 257), (4, 1000), (2, 21845)])
def test_sums_of_the_largest_words_do_not_wrap_at_n_max(bits: int, n_max: int) -> None:
    ring = Ring(bits, n_max)
    largest = np.full(3, ring.levels, dtype=np.uint32)
    total = np.zeros(3, dtype=np.uint32)
    for _ in range(n_max):
        total = ring.add(total, largest)
    assert total.tolist() == [n_max * ring.levels] * 3
    ring.check_sum(total, n_max)
    assert dequantize_sum(total, 1.0, ring.levels, n_max).tolist() == pytest.approx([n_max] * 3)


def test_one_client_more_than_n_max_is_refused() -> None:
    ring = Ring(4, 17)
    with pytest.raises(RunError, match="18"):
        ring.check_sum(np.zeros(1, dtype=np.uint32), 18)


def test_one_client_more_would_indeed_wrap_in_a_full_ring() -> None:
    ring = Ring(4, 17)  # 17·15 = 255: eight bits, all used
    full = np.array([17 * 15], dtype=np.uint32)
    assert ring.add(full, np.array([15], dtype=np.uint32))[0] < full[0]


@pytest.mark.parametrize(
    ("bits", "n_max", "reason"), [(0, 1, "bits"), (9, 1, "bits"), (4, 0, "clients"), (4, 1 << 16, "clients")]
)
def test_a_ring_out_of_range_is_refused(bits: int, n_max: int, reason: str) -> None:
    with pytest.raises(JobError, match=reason):
        Ring(bits, n_max)


def test_a_sum_that_no_honest_clients_have_is_refused() -> None:
    with pytest.raises(PeerError, match="at most 75 per word, got 76"):
        Ring(4, 10).check_sum(np.array([75, 76], dtype=np.uint32), 3)  # 8 bits have room for ten clients of 25
    with pytest.raises(RunError, match="got 0"):
        Ring(4, 10).check_sum(np.zeros(1, dtype=np.uint32), 0)


def test_an_auxiliary_sum_cannot_wrap_at_the_largest_cohort() -> None:
    assert MAX_COHORT * norm_word(1.0, 1.0) < 2**32


def test_an_impossible_auxiliary_sum_is_refused() -> None:
    with pytest.raises(PeerError, match="an auxiliary sum of 2 clients"):
        auxiliary_total(2 * AUXILIARY_ONE + 1, 2)


@given(st.floats(0, 1e30), st.floats(1e-12, 1e30))
def test_the_norm_sum_cannot_wrap_at_the_largest_cohort_whatever_the_norm(norm: float, most: float) -> None:
    assert 0 <= MAX_COHORT * norm_word(norm, most) < 2**32


@given(npst.arrays(np.float32, 50, elements=st.floats(-1, 1, width=32)), st.integers(1, 511))
def test_quantization_is_off_by_less_than_a_step(values: np.ndarray, levels: int) -> None:
    step = 2 / levels
    decoded = dequantize_sum(quantize(values, 1.0, levels, 3), 1.0, levels, 1)
    assert float(np.abs(decoded - values).max()) <= step * (1 + 1e-4)


@pytest.mark.parametrize("levels", [1, 3, 12, 510])
def test_quantization_is_unbiased(levels: int) -> None:
    values = np.full(200_000, 0.3, dtype=np.float32)
    decoded = dequantize_sum(quantize(values, 1.0, levels, 3), 1.0, levels, 1)
    standard_error = 1 / levels / values.size**0.5
    assert float(decoded.mean(dtype=np.float64)) == pytest.approx(0.3, abs=5 * standard_error)
