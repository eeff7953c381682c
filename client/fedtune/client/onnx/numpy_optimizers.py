"""AdamW and Muon in numpy, with the steps that torch's optimizers take.

optimizer = AdamW(work)
optimizer.step(trained, gradient)       # changes `trained` in place
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedtune.core.adapter.layout import Extent, Vector
from fedtune.core.bfloat16 import round_to_bfloat16
from fedtune.core.job.local_work import LocalWork

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LEAST_NORM = 1e-7
_MATCHED_RMS = 0.2


class Optimizer(Protocol):
    """Changes the trained values, step by step."""

    def step(self, trained: Vector, gradient: Vector) -> None:
        """Takes a step in place; both are float32, of the trained segment's length."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), with torch's defaults. At step t:

    m = β1 m + (1 - β1) g,   v = β2 v + (1 - β2) g²
    θ = θ (1 - η λ) - η / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
    """

    def __init__(self, work: LocalWork, size: int) -> None:
        self._rate, self._decay = work.learning_rate, work.weight_decay
        self._mean = np.zeros(size, dtype=np.float32)
        self._square = np.zeros(size, dtype=np.float32)
        self._steps = 0

    def step(self, trained: Vector, gradient: Vector) -> None:
        """Takes a step in place."""
        self._steps += 1
        first, second = (1.0 - beta**self._steps for beta in _BETAS)
        self._mean += np.float32(1.0 - _BETAS[0]) * (gradient - self._mean)
        self._square *= np.float32(_BETAS[1])
        self._square += np.float32(1.0 - _BETAS[1]) * np.square(gradient)
        trained *= np.float32(1.0 - self._rate * self._decay)
        root = np.sqrt(self._square) / np.float32(math.sqrt(second)) + np.float32(_EPSILON)
        trained -= np.float32(self._rate / first) * (self._mean / root)


class Muon:
    """Orthogonalised momentum (Jordan et al. 2024) for matrices of shape (m, n), with torch's defaults:

    M = μ M + (1 - μ) G,   θ = θ (1 - η λ) - 0.2 · √max(m, n) · η · orth((1 - μ) G + μ M)

    `orth` is five Newton-Schulz iterations in bfloat16, X = a X + (b X Xᵀ + c (X Xᵀ)²) X from X = G / ‖G‖.

    Args:
        extents: the matrices' extents in the trained segment.
    """

    def __init__(self, work: LocalWork, extents: Sequence[Extent], size: int) -> None:
        self._rate, self._decay = work.learning_rate, work.weight_decay
        self._extents = extents
        self._momentum = np.zeros(size, dtype=np.float32)

    def step(self, trained: Vector, gradient: Vector) -> None:
        """Takes a step in place."""
        self._momentum += np.float32(1.0 - _MOMENTUM) * (gradient - self._momentum)
        direction = gradient + np.float32(_MOMENTUM) * (self._momentum - gradient)
        trained *= np.float32(1.0 - self._rate * self._decay)
        for where, shape in self._extents:
            rate = np.float32(self._rate * _MATCHED_RMS * math.sqrt(max(shape)))
            trained[where] -= rate * orthogonalized(direction[where].reshape(shape)).reshape(-1)


def orthogonalized(matrix: Vector) -> Vector:
    """Returns U S Vᵀ for the matrix U Σ Vᵀ, with S between 0.5 and 1.5, in bfloat16's values; (m, n) -> (m, n)."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    a, b, c = (np.float32(number) for number in _NEWTON_SCHULZ)
    result = round_to_bfloat16(matrix)
    norm = round_to_bfloat16(np.array([np.linalg.norm(result)], dtype=np.float32))
    result = round_to_bfloat16((result / np.maximum(norm, np.float32(_LEAST_NORM))).astype(np.float32))
    for _ in range(_ITERATIONS):
        gram = round_to_bfloat16(result @ result.T)
        change = round_to_bfloat16(b * gram + c * (gram @ gram))
        result = round_to_bfloat16(a * result + change @ result)
    return result
