"""A matrix comes back from its singular values and vectors, also where the first attempt to find them fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.core.decomposition import thin_svd


def check(matrix: np.ndarray[Any, Any]) -> None:
    left, values, right = thin_svd(matrix)
    assert left.shape[1] == len(values) == right.shape[0] == min(matrix.shape)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(left * values @ right, matrix, atol=1e-12)
    np.testing.assert_allclose(left.T @ left, np.eye(len(values)), atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(len(values)), atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_where_the_algorithm_gives_up_the_transpose_gives_the_same(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    check(matrix)
    found, svd = thin_svd(matrix), np.linalg.svd

    def gives_up(asked: np.ndarray[Any, Any], **options: Any) -> Any:
        if asked.shape == matrix.shape and np.array_equal(asked, matrix):
            raise np.linalg.LinAlgError("SVD did not converge")
        return svd(asked, **options)

    monkeypatch.setattr(np.linalg, "svd", gives_up)
    check(matrix)
    np.testing.assert_allclose(thin_svd(matrix)[1], found[1], rtol=1e-12)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        thin_svd(np.full((3, 3), np.nan))
