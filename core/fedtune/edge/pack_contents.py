"""The tensors of an edge pack: their names, shapes and types, which follow from its facts.

    check_tensors(directory, facts, tensors)

A pack whose files have the right digests may still have been written wrongly; then a device says which tensor is wrong
before it trains. The inputs of the graphs are checked where the graphs are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.errors import ModelError
from fedtune.edge.pack_facts import REMEDY, WEIGHTS, PackFacts

BLOCK = 64  # numbers that share a scale
GROUP = 256  # scales that share a step
PACKED_PARTS = ("codes", "scale_codes", "scale_steps", "scale_mean")  # of a linear layer
PAIRS = "nf4.pairs"
SCALE_LEVELS = "nf4.scale_levels"
FREQUENCIES = "rope.frequencies"
_BYTE_VALUES = 256
_BYTES: np.dtype[Any] = np.dtype(np.uint8)
_FLOATS: np.dtype[Any] = np.dtype(np.float32)

Tensors = Mapping[str, npt.NDArray[Any]]
_Expected = tuple[str, "np.dtype[Any]", tuple[int, ...]]


def check_tensors(directory: Path, facts: PackFacts, tensors: Tensors) -> None:
    """Checks that a pack has every tensor that its facts imply.

    Raises:
        ModelError: a tensor is missing, has another shape or type, or the facts contradict each other; the message
            names the file, the tensor and the remedy.
    """
    path = directory / WEIGHTS
    for name, dtype, shape in _expected(directory, facts):
        if name not in tensors:
            raise ModelError(f"{path}: has no tensor {name}; {REMEDY}")
        found = tensors[name]
        if found.dtype != dtype or found.shape != shape:
            raise ModelError(
                f"{path}: {name} is {found.dtype} of shape {found.shape}; expected {dtype} of shape {shape}; {REMEDY}"
            )
    frequencies = tensors.get(FREQUENCIES)
    if frequencies is None or frequencies.dtype != _FLOATS or frequencies.ndim != 1:
        raise ModelError(f"{path}: has no tensor {FREQUENCIES} of one axis, in {_FLOATS}; {REMEDY}")


def _expected(directory: Path, facts: PackFacts) -> Iterator[_Expected]:
    shape = facts.shape
    yield PAIRS, _FLOATS, (_BYTE_VALUES, 2)
    yield SCALE_LEVELS, _FLOATS, (_BYTE_VALUES,)
    for name in dict.fromkeys((facts.embedding, facts.head)):
        yield name, _FLOATS, (shape.vocabulary, shape.width)
    layers: dict[str, set[str]] = {}
    for module in shape.linear:
        yield from _packed(module)
        layer, _, own = module.name.removeprefix(f"{facts.blocks}.").partition(".")
        layers.setdefault(layer, set()).add(own)
    alike = all(own == layers.get("0") for own in layers.values())
    if not alike or len(layers) != shape.layers or any(str(index) not in layers for index in range(len(layers))):
        raise ModelError(
            f"{directory}: the linear layers of its facts are not those of {shape.layers} blocks that are alike; "
            f"{REMEDY}"
        )


def _packed(module: AdaptedModule) -> Iterator[_Expected]:
    """Yields the tensors of a linear layer in NF4, see `fedtune.model.nf4`; codes fill whole blocks."""
    blocks = -(-module.d_out * module.d_in // BLOCK)
    yield f"{module.name}.codes", _BYTES, (blocks * BLOCK // 2,)
    yield f"{module.name}.scale_codes", _BYTES, (blocks,)
    yield f"{module.name}.scale_steps", _FLOATS, (-(-blocks // GROUP),)
    yield f"{module.name}.scale_mean", _FLOATS, ()
