"""The rotation is orthonormal and invertible, spreads values evenly, and pads little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.codec.rotation import MAX_PADDING, block_size, rotate, rotated_size, unrotate


@given(st.integers(0, 5000), st.integers(0, 1 << 62))
def test_rotation_keeps_the_norm_and_is_undone(count: int, seed: int) -> None:
    vector = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    rotated = rotate(vector, seed)
    assert rotated.shape == (rotated_size(count),)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    np.testing.assert_allclose(unrotate(rotated, count, seed), vector, atol=1e-5)


@given(st.integers(1, 10_000_000))
def test_padding_stays_small(count: int) -> None:
    assert rotated_size(count) % block_size(count) == 0
    assert 0 <= rotated_size(count) - count <= count * MAX_PADDING


def test_a_single_large_coordinate_is_spread_over_its_block() -> None:
    vector = np.zeros(32 * 1024, dtype=np.float32)
    vector[12345] = 1.0
    rotated = rotate(vector, 3)
    assert np.count_nonzero(rotated) == 1024
    assert float(np.abs(rotated).max()) == pytest.approx(1 / 32)


def test_one_lively_module_does_not_overload_a_block() -> None:
    vector = np.zeros(100_000, dtype=np.float32)
    vector[40_000:41_000] = np.random.default_rng(0).standard_normal(1000)
    blocks = rotate(vector, 3).reshape(block_size(vector.size), -1)
    energies = np.square(blocks).sum(axis=0)
    assert energies.max() < 4 * energies.mean()


def test_another_seed_is_another_rotation() -> None:
    vector = np.ones(256, dtype=np.float32)
    assert not np.array_equal(rotate(vector, 1), rotate(vector, 2))


def test_a_rotated_vector_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="rotate into"):
        unrotate(np.zeros(7, dtype=np.float32), 100, 0)
