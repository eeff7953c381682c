"""Singular values and vectors of a matrix, also where LAPACK's fast algorithm for them gives up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def thin_svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Returns U (m, k), the singular values (k,) in falling order and Vᵀ (k, n), with k = min(m, n).

    LAPACK's gesdd, which numpy calls, gives up on a rare finite matrix: one of 256 by 256 did, in the
    aggregation of a federation's products. The transpose has the same singular values, and other roundings on the way.

    Args:
        matrix: (m, n), finite.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        right, values, left = np.linalg.svd(matrix.T, full_matrices=False)
        left, right = left.T, right.T
    return left, values, right
