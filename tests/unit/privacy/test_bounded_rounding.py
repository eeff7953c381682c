"""Rounding within a norm: the bound always holds, and what is rounded is right on average."""

from __future__ import annotations

from math import sqrt

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.privacy.bounded_rounding import longest_rounded, round_bounded
from fedtune.core.privacy.discrete_gaussian import KEY_BYTES, KeyStream


def vector(count: int, norm: float, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(count)
    return (values * norm / np.linalg.norm(values)).astype(np.float32)


@given(st.integers(1, 400), st.floats(0.01, 300.0), st.integers(0, 2**32))
def test_every_value_goes_to_a_neighbour_and_the_norm_stays_within_its_bound(
    count: int, norm: float, seed: int
) -> None:
    values, longest = vector(count, norm, seed), longest_rounded(norm, count)
    rounded = round_bounded(values, longest, KeyStream(seed.to_bytes(KEY_BYTES, "big")))
    assert np.all(np.abs(rounded - values) < 1)
    assert np.linalg.norm(rounded) <= longest
    assert norm <= longest <= norm * (1 + 1e-5) + sqrt(count)


def test_a_vector_that_the_bound_would_cut_is_drawn_again_until_it_fits() -> None:
    values = np.full(64, 0.5, dtype=np.float32)  # norm 4; up to 8 when all are rounded up
    norms = []
    for seed in range(200):
        rounded = round_bounded(values, 5.5, KeyStream(seed.to_bytes(KEY_BYTES, "big")))
        norms.append(float(np.linalg.norm(rounded)))
    assert max(norms) <= 5.5
    assert len(set(norms)) > 5


def test_roundings_average_out() -> None:
    values, stream = vector(50, 40.0, 1), KeyStream(bytes(KEY_BYTES))
    longest, times = longest_rounded(40.0, 50), 4000
    mean = sum(round_bounded(values, longest, stream) for _ in range(times)) / times
    assert np.abs(mean - values).max() < 0.06
