"""Means of the products B_i·A_i instead of the factors: exact, reduced to rank R by an SVD.

    M = Σ w_i·B_i·A_i / Σ w_i,    B_i = B + ΔB_i,  A_i = A + ΔA_i        per module, float64
    M = U S Vᵀ,    B' = U_R S_R^½,  A' = S_R^½ V_Rᵀ

These aggregations need single updates, so they work in the clear only. They hold one dense matrix per module: as much
memory as the base's linear layers in float64, for a cohort of any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.basis import FRESH_ROW
from fedtune.core.adapter.layout import Vector
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.decomposition import svd
from fedtune.core.errors import UpdateError
from fedtune.core.job.methods import Method
from fedtune.strategies.aggregation.aggregator import NOTHING, Aggregate, Frame, Update
from fedtune.strategies.aggregation.mean import MAX_VALUE

RESIDUAL = "flora.residual"
_NEGLIGIBLE = 1e-9  # of the largest singular value

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ProductMean:
    """Averages products, and truncates the mean to the adapter's rank.

    FlexLoRA (Bai et al. 2024) loses the rest. FLoRA (Wang et al. 2024) stacks the clients' adapters, which adds their
    products and loses nothing: the rest is a residual that the server keeps in float32 and adds to every later round's
    mean before truncation. An adapter of rank R does not contain it, so FLoRA's result is not exported.

    Args:
        method: declares by `keeps_residual` which of the two it is.
    """

    method: Method

    def begin(self, frame: Frame) -> MeanOfProducts:
        """Returns an empty mean, on top of the residual where one is kept."""
        if not self.method.keeps_residual:
            return MeanOfProducts(frame, None)
        size = sum(module.d_out * module.d_in for module in frame.layout.modules)
        return MeanOfProducts(frame, frame.state.get(RESIDUAL, np.zeros(size, dtype=np.float32)))


class MeanOfProducts:
    """A streaming mean of products.

    Args:
        residual: all modules' (d_out, d_in) values one after another, float32; None to drop the truncated part.
    """

    def __init__(self, frame: Frame, residual: Vector | None) -> None:
        self._frame = frame
        self._residual = residual
        self._sums: dict[str, Matrix] = {m.name: np.zeros((m.d_out, m.d_in)) for m in frame.layout.modules}
        self._weight = 0

    def add(self, update: Update) -> None:
        """Adds one client's product, in which untrained values are those of the adapter.

        Raises:
            UpdateError: a value is not finite or too large, the length or the weight is wrong; the sums are unchanged.
        """
        values, weight = update.values, update.weight
        if values.shape != (self._frame.size,):
            raise UpdateError(f"an update of {values.size} values; expected {self._frame.size}")
        if weight < 1:
            raise UpdateError(f"weight {weight}; expected at least 1")
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= MAX_VALUE:  # also refuses NaN
            raise UpdateError(f"an update with a value of {largest}; expected at most {MAX_VALUE:g}")
        layout = self._frame.layout
        trained = self._frame.adapter.copy()
        trained[layout.segment(self._frame.factors)] += values
        for name, (lora_a, lora_b) in lora_layout(layout).pairs(trained).items():
            self._sums[name] += weight * (lora_b.astype(np.float64) @ lora_a)
        self._weight += weight

    def merge(self, other: MeanOfProducts) -> None:
        """Adds the other's sums; the float64 rounding depends on the order of addition."""
        for name, total in other._sums.items():
            self._sums[name] += total
        self._weight += other._weight

    def finish(self) -> Aggregate:
        """Returns the change that turns the adapter into the factors of the mean product."""
        layout, adapter = self._frame.layout, self._frame.adapter
        kept = NOTHING if self._residual is None else {RESIDUAL: self._residual}
        if not self._weight:
            return Aggregate(np.zeros(self._frame.size, dtype=np.float32), kept)
        after = np.empty_like(adapter)
        rest = []
        start = 0
        for name, (lora_a, lora_b) in lora_layout(layout).pairs(after).items():
            mean = self._sums[name] / self._weight
            if self._residual is not None:
                mean += self._residual[start : start + mean.size].reshape(mean.shape)
                start += mean.size
            lora_a[:], lora_b[:] = factors_of(mean, layout.rank)
            if self._residual is not None:
                rest.append((mean - lora_b.astype(np.float64) @ lora_a).astype(np.float32).reshape(-1))
        if rest:
            kept = {RESIDUAL: np.concatenate(rest)}
        segment = layout.segment(self._frame.factors)
        return Aggregate(after[segment] - adapter[segment], kept)


def factors_of(product: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Returns the best A (rank, d_in) and B (d_out, rank) for a product, balanced: A·Aᵀ = Bᵀ·B.

    Where the product has a lower rank, a column of B is zero and the row of A is a new one, orthogonal to the others,
    so that training can use it.
    """
    left, values, right = svd(product, full_matrices=False)
    lora_a, lora_b = np.zeros((rank, product.shape[1])), np.zeros((product.shape[0], rank))
    kept = min(rank, len(values))
    roots = np.sqrt(values[:kept])
    lora_a[:kept], lora_b[:, :kept] = right[:kept] * roots[:, None], left[:, :kept] * roots
    for index in np.flatnonzero(values[:kept] <= _NEGLIGIBLE * values[0]):
        lora_a[index], lora_b[:, index] = right[index] * FRESH_ROW, 0.0
    return lora_a, lora_b
