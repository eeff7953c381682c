"""The fixed factors of a core adapter: bases of a weight's dominant subspaces, the same bits on every machine.

A core adapter trains only the matrix R in ΔW = s · B · R · A (LoRA-XS, Bałazy et al. 2024). Every device needs the same
A and B, and they are as large as a LoRA adapter. So they are neither sent nor drawn: each device computes them from the
base model's weight W of shape (m, n), which it holds anyway, by block power iteration (Halko, Martinsson and Tropp,
"Finding structure with randomness", 2011):

    V_0 = Ω of random signs;   repeat:   U = orth(W · V),   V = orth(Wᵀ · U)          U: (m, r), V: (n, r)
    A = Vᵀ,   B = σ · U,   σ = ‖W‖_F / √min(m, n), the root mean square of W's singular values

With σ in B, a change of R by 1 changes W by a typical singular value, in every layer of every model.

A singular value decomposition would give every machine other bits, since libraries add in different orders. Here every
large product is a product of integers held in float64, whose partial sums stay below 2^53: it is exact, so the order
does not matter. `orth` is Cholesky's:  G = YᵀY,  G = L·Lᵀ,  orth(Y) = Y·L⁻ᵀ.  The small factorisation of G uses only
elementwise IEEE operations in a fixed order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import frexp, ldexp, sqrt

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import Vector
from fedtune.core.seeds import draw_signs, open_stream

ITERATIONS = 3
MAX_SIDE = 1 << 17  # features of a layer; the bounds below keep every sum under 2^53 up to here
_WEIGHT_BITS = 11
_BASIS_BITS = 24  # 11 + 24 + 17 = 52
_GRAM_BITS = 17  # 17 + 17 + 17 = 51
_INVERSE_BITS = 26  # 17 + 26 + 10 (at most 1024 columns) = 53
_LEAST_PIVOT = 2.0**-40  # of the largest diagonal: a direction that rounding has made

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FixedFactors:
    """The factors between which a core adapter trains, by module name.

    Args:
        pairs: module name -> (A of shape (R, d_in), B of shape (d_out, R)), both float32.
    """

    pairs: Mapping[str, tuple[Vector, Vector]]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 over names and little-endian bytes in hexadecimal; equal exactly when all bits are."""
        digest = hashlib.sha256()
        for name, factors in self.pairs.items():
            digest.update(name.encode() + b"\0")
            for factor in factors:
                digest.update(np.ascontiguousarray(factor, dtype="<f4").tobytes())
        return digest.hexdigest()


def fixed_factors(weight: Vector, rank: int, name: str) -> tuple[Vector, Vector]:
    """Returns (A, B) for one weight.

    Args:
        weight: reference weight of the layer, float32, (m, n), finite.
        rank: r, at most min(m, n).
        name: the module's name, from which the first random signs follow.

    Returns:
        A of shape (r, n) with orthonormal rows, and B of shape (m, r) with orthogonal columns of norm σ; float32.
    """
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns) or max(rows, columns) > MAX_SIDE:
        raise ValueError(f"{name}: no {rank} orthogonal directions in a weight of shape {weight.shape}")
    whole, scale = _integers(weight.astype(np.float64), _WEIGHT_BITS)
    signs = draw_signs(open_stream(0, f"fixed-factors {name}"), columns * rank)
    right = signs.reshape(columns, rank).astype(np.float64)
    left = np.empty((rows, rank))
    for _ in range(ITERATIONS):
        left = _orthonormal(whole @ _integers(right, _BASIS_BITS)[0])
        right = _orthonormal(whole.T @ _integers(left, _BASIS_BITS)[0])
    energy = int(np.square(whole.astype(np.int64)).sum())
    sigma = sqrt(energy / min(rows, columns)) * scale
    return np.ascontiguousarray(right.T.astype(np.float32)), (left * sigma).astype(np.float32)


def _integers(values: Matrix, bits: int) -> tuple[Matrix, float]:
    """Returns whole numbers of magnitude at most 2^bits in float64, and the power of two that scales them back."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0:
        return values, 1.0
    exponent = bits - frexp(largest)[1]
    return np.rint(np.ldexp(values, exponent)), ldexp(1.0, -exponent)


def _orthonormal(columns: Matrix) -> Matrix:
    """Returns an orthonormal basis of the columns' span, up to the rounding of its integers; (m, r) -> (m, r)."""
    basis = columns
    for _ in range(2):  # Cholesky's method squares the condition number; the second pass repairs what that costs
        whole = _integers(basis, _GRAM_BITS)[0]
        inverse = _integers(_inverse_cholesky(whole.T @ whole).T, _INVERSE_BITS)
        basis = (whole @ inverse[0]) * inverse[1]
    return basis


def _inverse_cholesky(gram: Matrix) -> Matrix:
    """Returns L⁻¹ of G = L·Lᵀ, (r, r), lower triangular; directions that are not there get a zero row."""
    rest, size = gram.copy(), len(gram)
    inverse = np.eye(size)
    least = float(gram.diagonal().max()) * _LEAST_PIVOT
    for index in range(size):
        pivot = float(rest[index, index])
        if pivot <= least:
            inverse[index] = 0.0
            continue
        root = sqrt(pivot)
        column = rest[index + 1 :, index] / root
        inverse[index] /= root
        rest[index + 1 :, index + 1 :] -= column[:, None] * column
        inverse[index + 1 :] -= column[:, None] * inverse[index]
    return inverse
