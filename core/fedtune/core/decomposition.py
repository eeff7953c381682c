"""Singular values and vectors of a matrix, also where LAPACK's fast algorithm for them gives up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def svd(matrix: Matrix, *, full_matrices: bool) -> tuple[Matrix, Matrix, Matrix]:
    """Returns U (m, k), the singular values (k,) in falling order and Vᵀ (k, n), with k = min(m, n).

    LAPACK's gesdd, which numpy calls, gives up on a rare finite matrix: one of 256 by 256 did, in the
    aggregation of a federation's products. The transpose has the same singular values, and other roundings on the way.

    Args:
        matrix: (m, n), finite.
        full_matrices: return all of U (m, m) and Vᵀ (n, n).

    Raises:
        LinAlgError: neither the matrix nor its transpose has been decomposed.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=full_matrices)
    except np.linalg.LinAlgError:
        right, values, left = np.linalg.svd(matrix.T, full_matrices=full_matrices)
        left, right = left.T, right.T
    return left, values, right
