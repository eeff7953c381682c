"""Optimizers of K adapters at once, each of which steps as its own optimizer would.

    optimizer = many_adamw(trained, work)              # or ManyMuon(matrices, work)
    optimizer.step()

AdamW acts on each value by itself, so one fused AdamW over all clients' values is K of them. Muon acts on each matrix:
its products are batched over the matrices of one shape, of all modules and clients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedtune.core.job.local_work import LocalWork

# torch's own, so that both say the same: momentum, coefficients, number of iterations and epsilon.
_MUON: Mapping[str, Any] = torch.optim.Muon([nn.Parameter(torch.zeros(1, 1))]).defaults
_MATCHED_RMS = 0.2  # of "match_rms_adamw": a step's root mean square over the learning rate


class Steps(Protocol):
    """An optimizer, as far as training needs it."""

    def step(self) -> object:
        """Changes the values by their gradients."""


def many_optimizer(trained: nn.Parameter, matrices: Sequence[nn.Parameter], work: LocalWork) -> Steps:
    """Returns the new optimizers of K clients with the same work, as one.

    Args:
        trained: all clients' trained values, (K, values), with their gradient.
        matrices: views of them, (K, m, n) each, with views of the gradient.
    """
    if work.optimizer == "muon":
        return ManyMuon(matrices, work)
    return torch.optim.AdamW([trained], lr=work.learning_rate, weight_decay=work.weight_decay, fused=True)


class ManyMuon:
    """Muon (Jordan et al. 2024) on the matrices (K, m, n) of K clients, as `torch.optim.Muon` on each of them:

        M ← μ M + (1 - μ) G,    θ ← (1 - η λ) θ - 0.2 √max(m, n) η · NS((1 - μ) G + μ M)

    where NS is five Newton-Schulz iterations in bfloat16, which make a matrix nearly orthogonal.

    Args:
        matrices: float32, with their gradients.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], work: LocalWork) -> None:
        self._work = work
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[tuple(matrix.shape)].append(matrix)
        self._groups = list(by_shape.items())
        self._momenta = [torch.zeros((len(group), *shape), device=group[0].device) for shape, group in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        """Changes the values by their gradients."""
        momentum, rate = _MUON["momentum"], self._work.learning_rate
        for (shape, group), kept in zip(self._groups, self._momenta, strict=True):
            gradients = torch.stack([_gradient(matrix) for matrix in group])
            kept.lerp_(gradients, 1 - momentum)
            steps = orthogonal(gradients.lerp(kept, momentum).view(-1, *shape[1:])).view(len(group), *shape)
            length = _MATCHED_RMS * max(shape[1:]) ** 0.5 * rate
            for matrix, step in zip(group, steps, strict=True):
                if self._work.weight_decay:
                    matrix.mul_(1 - rate * self._work.weight_decay)
                matrix.add_(step, alpha=-length)


def orthogonal(matrices: Tensor) -> Tensor:
    """Returns nearly orthogonal matrices with the singular vectors of these, (n, rows, columns), in bfloat16."""
    a, b, c = _MUON["ns_coefficients"]
    found = matrices.bfloat16()
    tall = found.shape[1] > found.shape[2]
    if tall:
        found = found.mT
    found = found / torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True).clamp(min=_MUON["eps"])
    for _ in range(_MUON["ns_steps"]):
        gram = torch.bmm(found, found.mT)
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


def _gradient(matrix: nn.Parameter) -> Tensor:
    assert matrix.grad is not None
    return matrix.grad
