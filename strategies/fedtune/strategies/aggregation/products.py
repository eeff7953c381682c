"""Aggregators of the products B_i·A_i instead of the factors: exact means, brought back to rank R by an SVD.

    M = Σ w_i·B_i·A_i / Σ w_i,    B_i = B + ΔB_i,  A_i = A + ΔA_i        per module, float64
    M = U S Vᵀ,    B' = U_R S_R^½,  A' = S_R^½ V_Rᵀ

They see every update, so they work in the clear only, and they hold one dense matrix a module: as much memory as the
base's linear layers in float64, whatever the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.adapter.rebalance import FRESH_ROW
from fedtune.core.adapter.tiers import RankSlice
from fedtune.core.errors import UpdateError
from fedtune.strategies.aggregation.aggregator import NOTHING, Accumulator, State
from fedtune.strategies.aggregation.exact_sum import MAX_VALUE

RESIDUAL = "flora.residual"
_NEGLIGIBLE = 1e-9  # of the largest singular value

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FlexLora:
    """FlexLoRA (Bai et al. 2024): the mean product, cut to rank R. What is cut is lost."""

    def factors(self, round_number: int) -> Factors:  # noqa: ARG002 - every round trains both
        """Both, in every round."""
        return "ab"

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,
        state: State = NOTHING,  # noqa: ARG002 - it keeps none
        slices: Sequence[RankSlice] = (),  # noqa: ARG002 - what a client does not train stays in its product
    ) -> Accumulator:
        """An empty mean of products."""
        return ProductMean(layout, factors, _given(adapter))


@dataclass(frozen=True)
class Flora:
    """FLoRA (Wang et al. 2024): the clients' adapters stacked, which adds their products and loses nothing.

    The stack has the clients' ranks in all; devices get its best part of rank R, and the rest is a residual that the
    server keeps in float32, adds to every later round's mean before it is cut, and folds into the base at export:

        ΔW = s·(B·A + residual)
    """

    def factors(self, round_number: int) -> Factors:  # noqa: ARG002 - every round trains both
        """Both, in every round."""
        return "ab"

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,
        state: State = NOTHING,
        slices: Sequence[RankSlice] = (),  # noqa: ARG002 - as FlexLora
    ) -> Accumulator:
        """An empty mean of products on top of the residual."""
        size = sum(module.d_out * module.d_in for module in layout.modules)
        return ProductMean(layout, factors, _given(adapter), state.get(RESIDUAL, np.zeros(size, dtype=np.float32)))


class ProductMean:
    """A streaming mean of products.

    Args:
        adapter: what the updates are added to.
        residual: all modules' (d_out, d_in) values one after another, float32; None where what is cut is lost.
    """

    def __init__(
        self, layout: AdapterLayout, factors: Factors, adapter: Vector, residual: Vector | None = None
    ) -> None:
        self._layout = layout
        self._segment = layout.segment(factors)
        self._adapter = adapter
        self._residual = residual
        self._sums: dict[str, Matrix] = {m.name: np.zeros((m.d_out, m.d_in)) for m in layout.modules}
        self._weight = 0
        self.state: State = {} if residual is None else {RESIDUAL: residual}

    def add(self, update: Vector, weight: int, tier: int = 0) -> None:
        """Adds one client's product; what it did not train is in it as it was."""
        del tier
        if update.shape != (self._segment.stop - self._segment.start,):
            raise UpdateError(f"an update of {update.size} values; expected {self._segment.stop - self._segment.start}")
        if weight < 1:
            raise UpdateError(f"weight {weight}; expected at least 1")
        largest = float(np.abs(update).max(initial=0.0))
        if not largest <= MAX_VALUE:  # also refuses NaN
            raise UpdateError(f"an update with a value of {largest}; expected at most {MAX_VALUE:g}")
        trained = self._adapter.copy()
        trained[self._segment] += update
        for name, (lora_a, lora_b) in self._layout.views(trained).items():
            self._sums[name] += weight * (lora_b.astype(np.float64) @ lora_a)
        self._weight += weight

    def finish(self) -> Vector:
        """What turns the adapter into the factors of the mean product."""
        if not self._weight:
            return np.zeros(self._segment.stop - self._segment.start, dtype=np.float32)
        adapter = np.empty_like(self._adapter)
        rest = []
        start = 0
        for name, (lora_a, lora_b) in self._layout.views(adapter).items():
            mean = self._sums[name] / self._weight
            if self._residual is not None:
                mean += self._residual[start : start + mean.size].reshape(mean.shape)
                start += mean.size
            lora_a[:], lora_b[:] = factors_of(mean, self._layout.rank)
            if self._residual is not None:
                rest.append((mean - lora_b.astype(np.float64) @ lora_a).astype(np.float32).reshape(-1))
        if rest:
            self.state = {RESIDUAL: np.concatenate(rest)}
        return adapter[self._segment] - self._adapter[self._segment]


def factors_of(product: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """The best A (rank, d_in) and B (d_out, rank) for a product, balanced: A·Aᵀ = Bᵀ·B.

    Where the product has less rank, a column of B is zero and the row of A is a fresh one, orthogonal to the others, so
    that training can go on in it.
    """
    left, values, right = np.linalg.svd(product, full_matrices=False)
    lora_a, lora_b = np.zeros((rank, product.shape[1])), np.zeros((product.shape[0], rank))
    kept = min(rank, len(values))
    roots = np.sqrt(values[:kept])
    lora_a[:kept], lora_b[:, :kept] = right[:kept] * roots[:, None], left[:, :kept] * roots
    for index in np.flatnonzero(values[:kept] <= _NEGLIGIBLE * values[0]):
        lora_a[index], lora_b[:, index] = right[index] * FRESH_ROW, 0.0
    return lora_a, lora_b


def _given(adapter: Vector | None) -> Vector:
    if adapter is None:
        raise ValueError("a mean of products needs the adapter that the updates belong to")
    return adapter
