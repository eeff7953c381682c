"""Changes of an adapter's basis, which write the same ΔW = B·A as other factors.

**Rebalancing** changes the basis for all clients, so that both factors carry the same share of every direction:

    B = Q_B·R_B,  Aᵀ = Q_A·R_A,  R_B·R_Aᵀ = U·S·Vᵀ            QR and SVD; O((d_out + d_in)·R²)
    B' = Q_B·U·S^½ = B·T,   A' = S^½·Vᵀ·Q_Aᵀ = T⁺·A
    T = R_Aᵀ·V·S^-½,        T⁺ = S^-½·Uᵀ·R_B,   T⁺·T = 1 on directions with S > 0

Residuals and optimizer state are relative to the basis and must follow it: those of B are multiplied by T from the
right, those of A by T⁺ from the left. Directions with S = 0 get a fresh orthogonal row in A and a zero column in B, and
lose their residuals and optimizer state.

**Alignment** rotates one client's factors towards the last global ones before they are averaged (FedRot-LoRA). Per
module, with the client's trained A_i, B_i and the received A, B:

    Q = argmin ‖B_i·Q - B‖² + ‖Qᵀ·A_i - A‖²  over orthogonal Q
      = U·Vᵀ  with  B_iᵀ·B + A_i·Aᵀ = U·S·Vᵀ               orthogonal Procrustes (Schönemann 1966)

B_i·Q·Qᵀ·A_i = B_i·A_i: the client's adapter is the same function, written in a basis near that of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import Factor, Vector
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.decomposition import svd

FRESH_ROW = 3.0**-0.5  # norm of a row of d values of the initial A, U(±1/sqrt(d))
_NEGLIGIBLE = 1e-7  # relative to the largest singular value; the factors are float32

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Basis:
    """The change of one module's basis.

    Args:
        t: T, float64, (R, R).
        t_inverse: T⁺, float64, (R, R).
    """

    t: Matrix
    t_inverse: Matrix


def rebalance(layout: LoraLayout, adapter: Vector) -> tuple[Vector, dict[str, Basis]]:
    """Returns the adapter in its balanced basis, and the change of each module's basis.

    A module whose product is zero, as in every module before round 1, is left as it is.
    """
    balanced = adapter.copy()
    changes = {}
    for name, (lora_a, lora_b) in layout.pairs(balanced).items():
        lora_a[:], lora_b[:], changes[name] = _rebalance_module(lora_a.astype(np.float64), lora_b.astype(np.float64))
    return balanced, changes


def basis_changes(layout: LoraLayout, held: Vector) -> dict[str, Basis]:
    """Returns the change of every module's basis when `held` is rebalanced.

    A module whose product has less than the full rank, as before round 1, keeps its basis: a change would lose the
    directions that another version of the adapter has and this one lacks.
    """
    changes = rebalance(layout, held)[1]
    same = Basis(np.eye(layout.rank), np.eye(layout.rank))
    return {name: change if change.t.any(axis=0).all() else same for name, change in changes.items()}


def changed(layout: LoraLayout, changes: Mapping[str, Basis], adapter: Vector) -> Vector:
    """Returns an adapter in the new basis, with the same products."""
    return np.concatenate([follow(layout, changes, factor, adapter[part]) for factor, part in layout.segments()])


def follow(layout: LoraLayout, changes: Mapping[str, Basis], factor: Factor, values: Vector) -> Vector:
    """Returns a residual, a moment or an update of one factor in the new basis: values·T for B, T⁺·values for A.

    Args:
        values: float32, (size of the factor,).
    """
    moved = np.empty_like(values)
    start = 0
    for module in layout.modules:
        change = changes[module.name]
        width = module.d_in if factor == "a" else module.d_out
        part = slice(start, start + layout.rank * width)
        if factor == "a":
            moved[part] = (change.t_inverse @ values[part].reshape(layout.rank, width)).reshape(-1)
        else:
            moved[part] = (values[part].reshape(width, layout.rank) @ change.t).reshape(-1)
        start = part.stop
    return moved


def align_update(layout: LoraLayout, received: Vector, update: Vector) -> Vector:
    """Returns a client's update after its alignment: aligned minus received.

    Args:
        received: whole adapter, float32, (layout.size,).
        update: trained minus received, of both factors, float32, (layout.size,).

    Returns:
        float32, (layout.size,).
    """
    trained = (received + update).astype(np.float32)
    aligned = np.empty_like(trained)
    parts = zip(
        layout.pairs(trained).values(), layout.pairs(received).values(), layout.pairs(aligned).values(), strict=True
    )
    for (own_a, own_b), (global_a, global_b), (into_a, into_b) in parts:
        turn = _alignment(own_a, own_b, global_a, global_b)
        into_a[:], into_b[:] = turn.T @ own_a, own_b @ turn
    return aligned - received


def _rebalance_module(lora_a: Matrix, lora_b: Matrix) -> tuple[Matrix, Matrix, Basis]:
    rank = len(lora_a)
    q_b, r_b = np.linalg.qr(lora_b)
    q_a, r_a = np.linalg.qr(lora_a.T)
    left, values, right = svd(r_b @ r_a.T, full_matrices=True)
    if not values.size or values[0] == 0:
        return lora_a, lora_b, Basis(np.eye(rank), np.eye(rank))
    # The sign of a pair of singular vectors differs between libraries; that of the change must be the same everywhere.
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    left, right = left * signs[: left.shape[1]], right * signs[:, None]
    kept = int((values > _NEGLIGIBLE * values[0]).sum())
    roots = np.sqrt(values[:kept])
    t, t_inverse = np.zeros((rank, rank)), np.zeros((rank, rank))
    t[:, :kept] = r_a.T @ right[:kept].T / roots
    t_inverse[:kept] = (left[:, :kept].T @ r_b) / roots[:, None]
    new_a, new_b = np.zeros_like(lora_a), np.zeros_like(lora_b)
    new_b[:, :kept] = q_b @ left[:, :kept] * roots
    new_a[:kept] = roots[:, None] * (right[:kept] @ q_a.T)
    fresh = right[kept:] @ q_a.T  # orthogonal to the others, and in the row space that A had
    new_a[kept : kept + len(fresh)] = fresh * FRESH_ROW
    return new_a, new_b, Basis(t, t_inverse)


def _alignment(own_a: Vector, own_b: Vector, global_a: Vector, global_b: Vector) -> np.ndarray:
    """Computes Q of one module, float64, (R, R)."""
    own_a64, own_b64 = own_a.astype(np.float64), own_b.astype(np.float64)
    left, _, right = svd(own_b64.T @ global_b + own_a64 @ global_a.T, full_matrices=True)
    turn: np.ndarray = left @ right
    return turn
