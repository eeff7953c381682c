"""Fixed factors span a weight's dominant subspaces, and have the same bits in whatever order a machine adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.adapter.fixed_factors import FixedFactors, fixed_factors
from fedtune.core.seeds import draw_uint16, open_stream

# Of `decaying(48, 80)` at rank 8; another value on any machine means that devices would not agree.
RECORDED = "80a92f889244202af8d4ed61a207c7470b86f628b17fb3ee789a9ce6e4d80b50"


def decaying(rows: int, columns: int, rate: float = 6.0) -> Any:
    """Returns a weight whose singular values fall like exp(-i/rate), of numbers that every machine draws alike."""
    side = min(rows, columns)

    def drawn(shape: tuple[int, int], name: str) -> Any:
        raw = draw_uint16(open_stream(1, name), shape[0] * shape[1]).astype(np.int64) - (1 << 15)
        return raw.reshape(shape)

    scale = np.rint(256 * np.exp(-np.arange(side) / rate)).astype(np.int64)
    whole = (drawn((rows, side), "left") >> 8) * scale @ (drawn((side, columns), "right") >> 8)
    return (whole / 2.0**30).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(48, 80, 8), (80, 48, 8), (33, 33, 33), (7, 200, 1)])
def test_rows_of_a_and_columns_of_b_are_orthogonal_and_as_long_as_promised(rows: int, columns: int, rank: int) -> None:
    weight = decaying(rows, columns)
    lora_a, lora_b = fixed_factors(weight, rank, "layer")
    assert (lora_a.shape, lora_b.shape) == ((rank, columns), (rows, rank))
    assert lora_a.dtype == lora_b.dtype == np.float32
    sigma = np.linalg.norm(weight.astype(np.float64)) / min(rows, columns) ** 0.5
    np.testing.assert_allclose(lora_a @ lora_a.T, np.eye(rank), atol=1e-4)
    np.testing.assert_allclose(lora_b.T @ lora_b / sigma**2, np.eye(rank), atol=1e-4)


def test_they_span_almost_what_the_leading_singular_vectors_span() -> None:
    weight = decaying(48, 80)
    lora_a, lora_b = fixed_factors(weight, 8, "layer")
    left, values, right = np.linalg.svd(weight.astype(np.float64))
    best = (values[:8] ** 2).sum()
    orthonormal = lora_b / np.linalg.norm(lora_b, axis=0)
    assert np.square(orthonormal.T @ weight @ lora_a.T).sum() > 0.97 * best
    assert np.square(right[:8] @ lora_a.T).sum() > 0.9 * 8
    assert np.square(left[:, :8].T @ orthonormal).sum() > 0.9 * 8


def test_the_bits_are_the_recorded_ones() -> None:
    assert FixedFactors({"layer": fixed_factors(decaying(48, 80), 8, "layer")}).digest == RECORDED


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(4, 300), columns=st.integers(4, 40), rank=st.integers(1, 4), seed=st.integers(0, 1000))
def test_another_order_of_additions_gives_the_same_bits(rows: int, columns: int, rank: int, seed: int) -> None:
    """Rows in another order are added in another order, in the Gram matrices and in Wᵀ·U; a library's would differ."""
    random = np.random.default_rng(seed)
    weight, order = random.standard_normal((rows, columns)).astype(np.float32), random.permutation(rows)
    lora_a, lora_b = fixed_factors(weight, rank, "layer")
    other_a, other_b = fixed_factors(weight[order], rank, "layer")
    assert np.array_equal(other_a, lora_a)
    assert np.array_equal(other_b, lora_b[order])


def test_a_weight_of_zeros_or_of_low_rank_gives_finite_factors() -> None:
    for weight in (np.zeros((12, 9), np.float32), np.outer(np.arange(12), np.ones(9)).astype(np.float32)):
        for factor in fixed_factors(weight, 5, "layer"):
            assert np.isfinite(factor).all()


def test_names_start_from_other_signs_and_digests_tell_them_apart() -> None:
    weight = decaying(48, 80)
    digests = {FixedFactors({name: fixed_factors(weight, 8, name)}).digest for name in ("q", "v")}
    assert len(digests) == 2


@pytest.mark.parametrize("rank", [0, 10])
def test_a_rank_over_the_smaller_side_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="layer: no"):
        fixed_factors(np.ones((12, 9), np.float32), rank, "layer")
