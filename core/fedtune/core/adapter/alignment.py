"""Turning a client's factors towards the last global ones, before they are averaged (FedRot-LoRA).

Per module, with the client's trained A_i, B_i and the received A, B:

    Q = argmin ‖B_i·Q - B‖² + ‖Qᵀ·A_i - A‖²  over orthogonal Q
      = U·Vᵀ  with  B_iᵀ·B + A_i·Aᵀ = U·S·Vᵀ               orthogonal Procrustes (Schönemann 1966)

B_i·Q·Qᵀ·A_i = B_i·A_i: what the client learned is the same function, written in the basis of the others.
"""

from __future__ import annotations

import numpy as np

from fedtune.core.adapter.layout import AdapterLayout, Vector


def align_update(layout: AdapterLayout, received: Vector, update: Vector) -> Vector:
    """A client's update after the turn: aligned minus received.

    Args:
        received: the whole adapter, float32, (layout.size,).
        update: trained minus received, of both factors, float32, (layout.size,).

    Returns:
        float32, (layout.size,).
    """
    trained = (received + update).astype(np.float32)
    aligned = np.empty_like(trained)
    parts = zip(
        layout.views(trained).values(), layout.views(received).values(), layout.views(aligned).values(), strict=True
    )
    for (own_a, own_b), (global_a, global_b), (into_a, into_b) in parts:
        turn = rotation(own_a, own_b, global_a, global_b)
        into_a[:], into_b[:] = turn.T @ own_a, own_b @ turn
    return aligned - received


def rotation(own_a: Vector, own_b: Vector, global_a: Vector, global_b: Vector) -> np.ndarray:
    """Q of one module, float64, (R, R)."""
    own_a64, own_b64 = own_a.astype(np.float64), own_b.astype(np.float64)
    left, _, right = np.linalg.svd(own_b64.T @ global_b + own_a64 @ global_a.T)
    turn: np.ndarray = left @ right
    return turn
