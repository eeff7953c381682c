"""Writing a function on named tensors as an ONNX graph, whose inputs and outputs keep the names.

    export(TracedBlock(base).backward, Path("backward.onnx"))

The function, gradients included, is first traced to a graph of primitive operations with sizes as symbols, and torch's
exporter translates that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fedtune.edge.blocks import GraphFunction
from fedtune.model.base_model import quiet

# Gradients for which torch's exporter has no translation.
_DECOMPOSED = (
    torch.ops.aten.silu_backward,
    torch.ops.aten.gelu_backward,
    torch.ops.aten._softmax_backward_data,
)


def export(function: GraphFunction, path: Path) -> None:
    """Writes the function to a file."""
    names = list(function.inputs)

    def positional(*values: torch.Tensor) -> list[torch.Tensor]:
        return list(function.compute(dict(zip(names, values, strict=True))))

    examples = tuple(function.inputs.values())
    anysize = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(function.dynamic.get(name, ()), anysize) for name in names)
    table: Any = torch._decomp.get_decompositions(_DECOMPOSED)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with quiet(), _silent():
        with mode:
            traced = make_fx(positional, decomposition_table=table)(*_symbolic(function, mode))
        program = torch.export.export(traced, examples, dynamic_shapes=shapes, strict=False)
        written: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    for value, name in zip(written.model.graph.inputs, names, strict=True):
        value.name = name
    for value, name in zip(written.model.graph.outputs, function.outputs, strict=True):
        value.name = name
    written.save(path)


def _symbolic(function: GraphFunction, mode: FakeTensorMode) -> list[torch.Tensor]:
    """Returns tensors without values for the inputs, whose dynamic axes have symbols as sizes, and all others numbers.

    With symbols for all axes, two that are equal in the examples by chance would count as the same.
    """
    return [
        mode.from_tensor(
            example,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[
                    DimDynamic.DYNAMIC if axis in function.dynamic.get(name, ()) else DimDynamic.STATIC
                    for axis in range(example.dim())
                ]
            ),
        )
        for name, example in function.inputs.items()
    ]


@contextmanager
def _silent() -> Iterator[None]:
    """Suppresses the exporter's advice about packages that it could use."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
