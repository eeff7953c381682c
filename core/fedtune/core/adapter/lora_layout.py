"""The layout of a LoRA adapter: all `lora_a` factors, then all `lora_b` factors.

Per adapted layer of the base model: ΔW = s · B · A with A (`lora_a`) in R^{R x d_in}, B (`lora_b`) in R^{d_out x R}.
Within a factor the values lie module after module and row-major.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from fedtune.core.adapter.layout import AdapterKind, AdapterLayout, Extent, Factor, Factors, Indices, LoraPairs, Vector
from fedtune.core.seeds import generator

INITIAL_GRID_BITS = 10


@dataclass(frozen=True)
class LoraLayout(AdapterLayout):
    """The layout of a LoRA adapter, whose pairs of factors are both in the vector."""

    kind: ClassVar[AdapterKind] = "lora"
    file: ClassVar[str] = "adapter_model.safetensors"
    factors: ClassVar[Factors] = "ab"

    @cached_property
    def size_a(self) -> int:
        """The number of values in all `lora_a` factors."""
        return self.rank * sum(module.d_in for module in self.modules)

    @cached_property
    def size_b(self) -> int:
        """The number of values in all `lora_b` factors."""
        return self.rank * sum(module.d_out for module in self.modules)

    @property
    def size(self) -> int:
        """The number of values in the whole adapter: the flat vector's length."""
        return self.size_a + self.size_b

    def segment(self, factors: Factors) -> slice:
        """Returns the position of the named factors in the flat vector."""
        match factors:
            case "a":
                return slice(0, self.size_a)
            case "b":
                return slice(self.size_a, self.size)
            case "ab":
                return slice(0, self.size)
            case "r":
                raise ValueError("a LoRA adapter has the factors a and b, and no r")

    @cached_property
    def extents(self) -> dict[str, tuple[Extent, Extent]]:
        """Module name -> the extents of its lora_a, (R, d_in), and of its lora_b, (d_out, R)."""
        extents = {}
        start_a, start_b = 0, self.size_a
        for module in self.modules:
            stop_a, stop_b = start_a + self.rank * module.d_in, start_b + module.d_out * self.rank
            extents[module.name] = (
                Extent(slice(start_a, stop_a), (self.rank, module.d_in)),
                Extent(slice(start_b, stop_b), (module.d_out, self.rank)),
            )
            start_a, start_b = stop_a, stop_b
        return extents

    def pairs(self, vector: Vector) -> LoraPairs:
        """Returns the factors in a flat vector by module; they are views into `vector`, float32, (size,)."""
        self.check(vector)
        return {
            name: (vector[a.where].reshape(a.shape), vector[b.where].reshape(b.shape))
            for name, (a, b) in self.extents.items()
        }

    def tensors(self, vector: Vector) -> dict[str, Vector]:
        """Returns the factors by peft's names."""
        return peft_tensors(self.pairs(vector))

    def initial(self, seed: int) -> Vector:
        """Returns a job's first adapter: A ~ U(±1/sqrt(d_in)), peft's Kaiming initialisation, and B = 0, so ΔW = 0.

        A is rounded to a binary grid of 2^-INITIAL_GRID_BITS of its range, as everything on the downlink is, so that
        any later version differs from it by whole numbers of steps.
        """
        vector = np.zeros(self.size, dtype=np.float32)
        random = generator(seed, "adapter-init")
        for module in self.modules:
            bound = 1.0 / math.sqrt(module.d_in)
            lora_a, _ = self.pairs(vector)[module.name]
            step = 2.0 ** (math.floor(math.log2(bound)) - INITIAL_GRID_BITS)
            steps = np.rint(random.uniform(-bound, bound, size=lora_a.shape) / step)
            lora_a[:] = steps * step + 0.0  # turns -0 into 0, as adding a change of zero would
        return vector

    def coordinates(self, factor: Factor, owned: Indices) -> Indices:
        """Returns the positions of rows I of every A, (R, d_in) row-major, or of columns I of every B, (d_out, R)."""
        parts, start = [], 0
        for module in self.modules:
            if factor == "a":
                grid = owned[:, None] * module.d_in + np.arange(module.d_in)
                size = self.rank * module.d_in
            else:
                grid = np.arange(module.d_out)[:, None] * self.rank + owned
                size = self.rank * module.d_out
            parts.append(start + grid.reshape(-1))
            start += size
        return np.concatenate(parts)


def peft_tensors(pairs: LoraPairs) -> dict[str, Vector]:
    """Returns factors by the names that peft stores them under."""
    letters = {"A": 0, "B": 1}
    return {
        f"base_model.model.{name}.lora_{letter}.weight": pair[index]
        for name, pair in pairs.items()
        for letter, index in letters.items()
    }


def lora_layout(layout: AdapterLayout) -> LoraLayout:
    """Returns the layout of a method that needs both factors, which the check of a job has promised.

    Raises:
        ValueError: the adapter is of another kind.
    """
    if not isinstance(layout, LoraLayout):
        raise ValueError(f"an adapter of the kind {layout.kind} has no pair of trained factors")
    return layout
