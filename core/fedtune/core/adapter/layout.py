"""The adapter as one flat float32 vector, and the layout that gives every value its position.

Per adapted layer of the base model: ΔW = s · B · A with A (`lora_a`) in R^{R x d_in}, B (`lora_b`) in R^{d_out x R}
and s = alpha / sqrt(R), the rank-stabilised scaling of rsLoRA (Kalajdzievski 2023), the same for every rank tier.

The vector holds all `lora_a` factors first, module after module and row-major, then all `lora_b` factors. A round that
trains one factor therefore reads, sends and aggregates one contiguous half.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedtune.core.errors import ModelError
from fedtune.core.seeds import generator

Vector = npt.NDArray[np.float32]
Factor = Literal["a", "b"]
Factors = Literal["a", "b", "ab"]
FACTORS: tuple[Factor, ...] = ("a", "b")

INITIAL_GRID_BITS = 10

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedModule:
    """A linear layer of the base model that carries a pair of factors.

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
class AdapterLayout:
    """The adapted modules, their rank and scale, and the position of each factor in the flat vector."""

    modules: tuple[AdaptedModule, ...]
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if not self.modules:
            raise ModelError("the adapter has no module to adapt")
        if self.rank < 1:
            raise ModelError(f"the adapter's rank is {self.rank}; expected at least 1")

    @property
    def scaling(self) -> float:
        """s = alpha / sqrt(R)."""
        return self.alpha / math.sqrt(self.rank)

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

    def views(self, vector: Vector) -> dict[str, tuple[Vector, Vector]]:
        """Returns the factors in a flat vector by module.

        Args:
            vector: float32, shape (size,).

        Returns:
            Module name -> (lora_a of shape (R, d_in), lora_b of shape (d_out, R)), both views into `vector`.
        """
        self.check(vector)
        return {
            name: (vector[a.where].reshape(a.shape), vector[b.where].reshape(b.shape))
            for name, (a, b) in self.extents.items()
        }

    def initial(self, seed: int) -> Vector:
        """Returns a job's first adapter: A ~ U(±1/sqrt(d_in)), peft's Kaiming initialisation, and B = 0, so ΔW = 0.

        A is rounded to a binary grid of 2^-INITIAL_GRID_BITS of its range, as everything on the downlink is, so that
        any later version differs from it by whole numbers of steps.
        """
        vector = np.zeros(self.size, dtype=np.float32)
        random = generator(seed, "adapter-init")
        for module in self.modules:
            bound = 1.0 / math.sqrt(module.d_in)
            lora_a, _ = self.views(vector)[module.name]
            step = 2.0 ** (math.floor(math.log2(bound)) - INITIAL_GRID_BITS)
            steps = np.rint(random.uniform(-bound, bound, size=lora_a.shape) / step)
            lora_a[:] = steps * step + 0.0  # turns -0 into 0, as adding a change of zero would
        return vector

    def halves(self, vector: Vector) -> tuple[Vector, Vector]:
        """Returns all `lora_a` and all `lora_b` values, both views into `vector`."""
        self.check(vector)
        return vector[: self.size_a], vector[self.size_a :]

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


def save_adapter(directory: Path, layout: AdapterLayout, vector: Vector, base: str) -> None:
    """Writes an adapter as peft does, so that `peft.PeftModel.from_pretrained(model, directory)` loads it.

    Args:
        directory: folder of the files; created if it does not exist; files in it are replaced.
        layout: layout of `vector`.
        vector: float32, (layout.size,).
        base: value of `base_model_name_or_path`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (lora_a, lora_b) in layout.views(vector).items():
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = lora_a
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = lora_b
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": layout.rank,
        "lora_alpha": layout.alpha,
        "lora_dropout": 0.0,
        "use_rslora": True,
        "bias": "none",
        "target_modules": [module.name for module in layout.modules],
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(directory: Path, layout: AdapterLayout) -> Vector:
    """Reads an adapter in peft's format into a flat vector.

    Raises:
        ModelError: the files are missing or broken, or names or shapes differ from the layout (all are listed).
    """
    path = directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable adapter: {error}") from error
    vector = np.zeros(layout.size, dtype=np.float32)
    problems = []
    for name, factors in layout.views(vector).items():
        for letter, place in zip("AB", factors, strict=True):
            key = f"{_PEFT_PREFIX}{name}.lora_{letter}.weight"
            tensor = tensors.pop(key, None)
            if tensor is None:
                problems.append(f"{key} is missing")
            elif tensor.shape != place.shape:
                problems.append(f"{key} has shape {tensor.shape}; expected {place.shape}")
            else:
                place[:] = tensor
    problems += [f"{key} is not part of the adapter" for key in sorted(tensors)]
    if problems:
        raise ModelError(f"{path} does not fit the model:\n  " + "\n  ".join(problems))
    return vector
