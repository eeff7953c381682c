"""The layout of an adapter: it gives every trained value its position in one flat float32 vector.

A vector is a sequence of *factors*, each a contiguous segment, so that a round which trains one factor reads, sends and
aggregates one segment. Two kinds of adapter have a layout: `fedtune.core.adapter.lora_layout` (factors "a" and "b") and
`fedtune.core.adapter.core_layout` (factor "r"). Codecs, rounds and devices know this interface only.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import ModelError

Vector = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
Factor = Literal["a", "b", "r"]
Factors = Literal["a", "b", "ab", "r"]
FACTORS: tuple[Factor, ...] = ("a", "b", "r")
LoraPairs = Mapping[str, tuple[Vector, Vector]]
"""Module name -> (lora_a of shape (R, d_in), lora_b of shape (d_out, R)), both float32: ΔW = s · B · A."""
AdapterKind = Literal["lora", "core"]


@dataclass(frozen=True)
class AdaptedModule:
    """A linear layer of the base model that carries a part of the adapter.

    Args:
        name: dotted path in the base model, e.g. "model.layers.0.self_attn.q_proj".
        d_in: number of input features.
        d_out: number of output features.
    """

    name: str
    d_in: int
    d_out: int


class Extent(NamedTuple):
    """The position of one factor of a module in the flat vector, row-major, and its shape."""

    where: slice
    shape: tuple[int, int]


@dataclass(frozen=True)
class AdapterLayout(ABC):
    """The adapted modules, their rank and scale, and the position of each factor in the flat vector."""

    modules: tuple[AdaptedModule, ...]
    rank: int
    alpha: float

    kind: ClassVar[AdapterKind]
    file: ClassVar[str]
    """The name of the file that stores a vector."""
    factors: ClassVar[Factors]
    """All factors, in the order of the flat vector."""

    def __post_init__(self) -> None:
        if not self.modules:
            raise ModelError("the adapter has no module to adapt")
        if self.rank < 1:
            raise ModelError(f"the adapter's rank is {self.rank}; expected at least 1")

    @property
    def scaling(self) -> float:
        """s = alpha / sqrt(R), the rank-stabilised scaling of rsLoRA (Kalajdzievski 2023), the same for every tier."""
        return self.alpha / math.sqrt(self.rank)

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of values in the whole adapter: the flat vector's length."""

    @abstractmethod
    def segment(self, factors: Factors) -> slice:
        """Returns the position of the named factors in the flat vector."""

    @abstractmethod
    def initial(self, seed: int) -> Vector:
        """Returns a job's first adapter, with which ΔW = 0, on a binary grid, as everything on the downlink is."""

    @abstractmethod
    def pairs(self, vector: Vector) -> LoraPairs:
        """Returns the LoRA adapter of the same rank and scale with the same ΔW.

        Args:
            vector: float32, shape (size,).
        """

    @abstractmethod
    def tensors(self, vector: Vector) -> dict[str, Vector]:
        """Returns the values of a flat vector by the names that `file` stores them under; views into `vector`."""

    @property
    def fixed_digest(self) -> str:
        """The digest of the factors that nobody trains; "" where there are none."""
        return ""

    @abstractmethod
    def coordinates(self, factor: Factor, owned: Indices) -> Indices:
        """Returns the positions of the owned rank indices within a factor's segment: int, ascending, from 0."""

    def segments(self) -> Iterator[tuple[Factor, slice]]:
        """Yields each factor and its segment, in the order of the flat vector."""
        for letter in factor_letters(self.factors):
            yield letter, self.segment(letter)

    def parts(self, vector: Vector) -> tuple[Vector, ...]:
        """Returns the values of each factor, all of them views into `vector`."""
        self.check(vector)
        return tuple(vector[segment] for _, segment in self.segments())

    def check(self, vector: Vector) -> None:
        """Raises ModelError unless the vector has this layout's length and type."""
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise ModelError(
                f"the adapter vector is {vector.dtype} of shape {vector.shape}; expected float32, ({self.size},)"
            )


def factor_letters(factors: Factors) -> list[Factor]:
    """Returns the factors one by one, in the order of the flat vector."""
    return [factor for factor in FACTORS if factor in factors]


def adapter_digest(vector: Vector) -> str:
    """Returns the SHA-256 of the vector's little-endian bytes in hexadecimal; equal exactly when all bits are."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()
