"""A matrix comes back from its singular values and vectors, also where the first attempt to find them fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.core.adapter.basis import rebalance
from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.decomposition import svd


def check(matrix: np.ndarray[Any, Any]) -> None:
    left, values, right = svd(matrix, full_matrices=False)
    assert left.shape[1] == len(values) == right.shape[0] == min(matrix.shape)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(left * values @ right, matrix, atol=1e-12)
    np.testing.assert_allclose(left.T @ left, np.eye(len(values)), atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(len(values)), atol=1e-12)
    whole_left, _, whole_right = svd(matrix, full_matrices=True)
    assert (whole_left.shape[1], whole_right.shape[0]) == matrix.shape
    np.testing.assert_allclose(whole_right @ whole_right.T, np.eye(matrix.shape[1]), atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_where_the_algorithm_gives_up_the_transpose_gives_the_same(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    check(matrix)
    (_, found, _), fast = svd(matrix, full_matrices=False), np.linalg.svd

    def gives_up(asked: np.ndarray[Any, Any], **options: Any) -> Any:
        if asked.shape == matrix.shape and np.array_equal(asked, matrix):
            raise np.linalg.LinAlgError("SVD did not converge")
        return fast(asked, **options)

    monkeypatch.setattr(np.linalg, "svd", gives_up)
    check(matrix)
    np.testing.assert_allclose(svd(matrix, full_matrices=False)[1], found, rtol=1e-12)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        svd(np.full((3, 3), np.nan), full_matrices=False)


def test_a_rank_above_the_outputs_of_a_layer_keeps_rows_that_training_can_use() -> None:
    """Where all of a row of A and of its column of B is zero, neither has a gradient ever again."""
    layout = LoraLayout((AdaptedModule("narrow", d_in=16, d_out=4),), rank=8, alpha=8.0)
    adapter = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    rebalanced, _ = rebalance(layout, adapter)
    ((lora_a, lora_b),) = layout.pairs(rebalanced).values()
    assert (np.abs(lora_a).max(axis=1) > 0).all()
    ((before_a, before_b),) = layout.pairs(adapter).values()
    np.testing.assert_allclose(lora_b @ lora_a, before_b @ before_a, atol=1e-4)
