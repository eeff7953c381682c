"""The layout of a core adapter: one square matrix R for each adapted layer, between two fixed factors.

Per adapted layer of the base model: ΔW = s · B · R · A with R in R^{R x R}, and with A, B of
`fedtune.core.adapter.fixed_factors`, which nobody trains or sends (LoRA-XS, Bałazy et al. 2024). R starts at 0.

The mean of clients' R is exact, since ΔW is linear in R. A device of a smaller tier trains the block R[I, I] of the
round's rank indices I; over the rounds every pair of indices has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedtune.core.adapter.fixed_factors import FixedFactors, fixed_factors
from fedtune.core.adapter.layout import (
    AdaptedModule,
    AdapterKind,
    AdapterLayout,
    Extent,
    Factor,
    Factors,
    Indices,
    LoraPairs,
    Vector,
)
from fedtune.core.errors import ModelError

WeightOf = Callable[[str], Vector]


@dataclass(frozen=True)
class CoreLayout(AdapterLayout):
    """The layout of a core adapter: the matrices R, module after module and row-major.

    Args:
        fixed: the fixed factors of every module.
    """

    fixed: FixedFactors = field(repr=False, compare=False)

    kind: ClassVar[AdapterKind] = "core"
    file: ClassVar[str] = "core.safetensors"
    factors: ClassVar[Factors] = "r"

    @classmethod
    def between(cls, modules: tuple[AdaptedModule, ...], rank: int, alpha: float, weight: WeightOf) -> CoreLayout:
        """Returns the layout between the fixed factors of these modules' weights.

        Args:
            weight: module name -> its reference weight, float32, (d_out, d_in).

        Raises:
            ModelError: the rank is over the smaller side of a layer.
        """
        check_rank(modules, rank)
        pairs = {module.name: fixed_factors(weight(module.name), rank, module.name) for module in modules}
        return cls(modules, rank, alpha, FixedFactors(pairs))

    @property
    def size(self) -> int:
        """The number of values in the whole adapter: the flat vector's length."""
        return len(self.modules) * self.rank**2

    def segment(self, factors: Factors) -> slice:
        """Returns the position of the named factors in the flat vector."""
        if factors != "r":
            raise ValueError(f"a core adapter has the factor r, and no {factors}")
        return slice(0, self.size)

    @property
    def fixed_digest(self) -> str:
        """The digest of the factors that nobody trains."""
        return self.fixed.digest

    @property
    def extents(self) -> dict[str, Extent]:
        """Module name -> the extent of its R."""
        size = self.rank**2
        return {
            module.name: Extent(slice(index * size, (index + 1) * size), (self.rank, self.rank))
            for index, module in enumerate(self.modules)
        }

    def tensors(self, vector: Vector) -> dict[str, Vector]:
        """Returns the matrices R by the names of their modules."""
        self.check(vector)
        return {f"{name}.core": vector[where].reshape(shape) for name, (where, shape) in self.extents.items()}

    def initial(self, seed: int) -> Vector:
        """Returns a job's first adapter, all zeros, whatever the seed."""
        del seed
        return np.zeros(self.size, dtype=np.float32)

    def coordinates(self, factor: Factor, owned: Indices) -> Indices:
        """Returns the positions of R[I, I] of every module."""
        del factor
        block = (owned[:, None] * self.rank + owned).reshape(-1)
        starts = np.arange(len(self.modules)) * self.rank**2
        return (starts[:, None] + block).reshape(-1)

    def pairs(self, vector: Vector) -> LoraPairs:
        """Returns the LoRA adapter of the same rank and scale with the same ΔW: A, and B·R.

        Args:
            vector: float32, shape (size,).
        """
        self.check(vector)
        pairs = {}
        for name, (where, shape) in self.extents.items():
            lora_a, lora_b = self.fixed.pairs[name]
            pairs[name] = (lora_a, (lora_b.astype(np.float64) @ vector[where].reshape(shape)).astype(np.float32))
        return pairs


def check_rank(modules: Sequence[AdaptedModule], rank: int) -> None:
    """Checks that a core adapter of this rank fits all modules.

    Raises:
        ModelError: the rank is over the smaller side of a layer.
    """
    for module in modules:
        if rank > (side := min(module.d_in, module.d_out)):
            raise ModelError(
                f"adapter.rank is {rank}, but {module.name} maps {module.d_in} features to {module.d_out}; "
                f'expected at most {side}, other adapter.target_modules, or adapter.kind = "lora"'
            )
