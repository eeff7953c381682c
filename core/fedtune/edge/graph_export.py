"""Translating a function on named tensors into an ONNX graph, whose inputs and outputs keep the names.

    exported(head_function(base)).save(Path("head.onnx"))

The function, gradients included, is first traced to a graph of primitive operations with sizes as symbols, and torch's
exporter translates that.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
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


def _power(x: torch.Tensor, exponent: float) -> Any:
    """Computes small powers as products: onnxruntime's Pow takes most exponents by logarithms, forty times as long."""
    match exponent:
        case 1:
            return x.clone()
        case 2:
            return x * x
        case 3:
            return x * x * x
    return NotImplemented


def _slice_gradient(gradient: torch.Tensor, sizes: Sequence[int], axis: int, start: int, end: int, step: int) -> Any:
    """Fills up a slice's gradient with zeros: the exporter's own way copies it five times."""
    if step != 1:
        return NotImplemented
    if start == 0 and end == sys.maxsize:
        return gradient.clone()
    after = 0 if end == sys.maxsize else sizes[axis] - end
    before, behind = (
        [gradient.new_zeros([*sizes[:axis], size, *sizes[axis + 1 :]])] if size else [] for size in (start, after)
    )
    return torch.cat([*before, gradient, *behind], dim=axis)


_REPLACED = {torch.ops.aten.pow.Tensor_Scalar: _power, torch.ops.aten.slice_backward.default: _slice_gradient}


def exported(function: GraphFunction) -> ir.Model:
    """Returns the function's graph."""
    names = list(function.inputs)

    def positional(*values: torch.Tensor) -> list[torch.Tensor]:
        return list(function.compute(dict(zip(names, values, strict=True))))

    examples = tuple(function.inputs.values())
    anysize = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(function.dynamic.get(name, ()), anysize) for name in names)
    table: Any = {**torch._decomp.get_decompositions(_DECOMPOSED), **_REPLACED}
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
    model: ir.Model = written.model
    return model


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
