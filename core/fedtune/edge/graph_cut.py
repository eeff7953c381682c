"""Cutting the graph of a function and its gradients in two: forward, which also returns what backward needs, and back.

    forward, backward = halves(exported(TracedBlock(base).step), "x", "y", "y_gradient")

The values that the gradients need are outputs of the first graph and inputs of the second, by the same names. Whoever
runs them keeps these values between the two, or drops them and runs the first graph again just before the second.
Few values are kept: what one pass over the others gives, both graphs compute.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

KEPT = "kept."  # in front of the names of these values
# Operations that cost no more than to read their result from memory.
_CHEAP = frozenset({"Add", "ConstantOfShape", "Expand", "Identity", "Mul", "Reshape", "Sigmoid", "Slice", "Squeeze"})
_CHEAP |= {"Sub", "Transpose", "Unsqueeze"}


def halves(model: ir.Model, x: str, y: str, y_gradient: str) -> tuple[ir.Model, ir.Model]:
    """Returns the two graphs.

    Args:
        x: name of the function's input.
        y: name of its output, of the same shape; all other outputs are gradients.
        y_gradient: name of the input with the gradient of y.
    """
    graph = model.graph
    named = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    result, start = named[y], named[y_gradient]
    for node in graph:
        if node.op_type == "Shape" and node.inputs[0] is start:
            node.replace_input_with(0, named[x])
    late = {start}
    for node in graph:  # in topological order
        if not late.isdisjoint(node.inputs):
            late.update(node.outputs)
    needed = [value for node in graph if node.outputs[0] in late for value in node.inputs if value]
    sources = list(dict.fromkeys(each for value in needed if value not in late for each in _sources(value)))
    kept = [value for value in sources if not _follows(value, sources, itself=False)]
    for index, value in enumerate(kept):
        value.name = f"{KEPT}{index}"
    inputs = [value for value in graph.inputs if value is not start]
    gradients = [value for value in graph.outputs if value is not result]
    first = ir.convenience.extract(graph, inputs, [result, *kept])
    second = ir.convenience.extract(graph, [*inputs, start, *kept], gradients)
    return _model(first, model), _model(second, model)


def _sources(value: ir.Value) -> list[ir.Value]:
    """Returns, in a list, the value from which cheap operations lead to this one: itself where there are several."""
    node = value.producer()
    if node is None or not _numeric(value):
        return []
    if node.op_type not in _CHEAP:
        return [value]
    sources = list(dict.fromkeys(source for each in node.inputs if each for source in _sources(each)))
    return sources if len(sources) < 2 else [value]


def _follows(value: ir.Value, sources: Collection[ir.Value], *, itself: bool = True) -> bool:
    """Returns whether cheap operations lead to a value from the sources, inputs, constants and sizes."""
    node = value.producer()
    if node is None or not _numeric(value) or (itself and value in sources):
        return True
    return node.op_type in _CHEAP and all(_follows(each, sources) for each in node.inputs if each)


def _numeric(value: ir.Value) -> bool:
    """Returns whether a value is of floating-point numbers; all others are sizes and places."""
    return value.dtype is None or value.dtype.is_floating_point()


def _model(graph: ir.Graph, original: ir.Model) -> ir.Model:
    return ir.Model(graph, ir_version=original.ir_version, producer_name=original.producer_name)
