"""Rewriting a float ONNX graph with products in the int4 grid, filled by our own quantization.

    MatMul(x, Wᵀ)                        ->  MatMulNBits(x, codes, scales, zeros)
    Gather(E, ids), E the tied head      ->  GatherBlockQuantized(codes, ids, scales, zeros) of the head's codes

All products with a constant matrix have the recipe's bits, except adapters' factors, which stay in float, the head,
which always has 8 bits, and as many of the most sensitive ones as the recipe says: those with the largest relative
error of their output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fedtune.model.int4 import BLOCK, HEAD_BITS, GridWeight, quantize
from fedtune.server.export.onnx_model import OnnxModel
from fedtune.server.export.rounding import output_error, round_compensated

DATA = "model.onnx.data"
FACTOR = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.lora_([AB])\.MatMul\.weight")
"""The model builder's names of an adapter's factors."""
_CALIBRATION = "calibration.onnx"
_GRAM_BYTES = 1 << 30  # of Gram matrices that are held at a time; more take another pass over the calibration examples
_TOKENS_AT_ONCE = 512  # of short examples together: a product of matrices costs less than reading and writing its sum
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_PRODUCTS = ("MatMul", "Gemm")

Progress = Callable[[str, int, int], None]
"""A function that takes what is done, and how many of how many pieces."""


@dataclass(frozen=True)
class Grid:
    """The way to quantize a graph.

    Args:
        bits: 4 or 8.
        level: accuracy level of the products: 4 rounds activations to 8 bits, block by block; 1 leaves them in float32.
        wide: share of the products' numbers, those most sensitive, that get 8 bits instead of 4.
        keep: whether weights that lie on the grid already keep their values.
    """

    bits: int
    level: int = 4
    wide: float = 0.0
    keep: bool = False


def rewrite(directory: Path, grid: Grid, calibration: Sequence[Sequence[int]], provider: str, watch: Progress) -> None:
    """Quantizes a written model in place.

    Args:
        calibration: token ids of texts that the model will see; empty for least squares without calibration.
        provider: the execution provider that runs the calibration.

    Raises:
        RuntimeError: the graph has no product that could be quantized, or its head is none.
    """
    model = onnx.load(directory / "model.onnx")
    _resolve_transposed(model)
    matrices = _matrices(model)
    products = [node for node in model.graph.node if _is_product(node, matrices)]
    if not products:
        raise RuntimeError("no product of the graph could be quantized")
    packed: dict[str, GridWeight] = {}
    head = _head(model, products)
    body = [node for node in products if node is not head]
    errors: dict[str, float] = {}
    with torch.no_grad():
        for done, (node, gram) in enumerate(_with_grams(directory, body, matrices, calibration, provider, watch)):
            watch("quantizing", done, len(products))
            weight = _weight(matrices[node.input[1]])
            packed[node.name] = _packed(weight, gram, grid.bits, grid)
            if grid.wide:
                errors[node.name] = output_error(weight, packed[node.name], gram)
        for node in _most_sensitive(body, matrices, errors, grid.wide):
            packed[node.name] = quantize(_weight(matrices[node.input[1]]), 8, keep=grid.keep)
        packed[head.name] = quantize(_weight(matrices[head.input[1]]), HEAD_BITS, keep=grid.keep)
    watch("quantizing", len(products), len(products))
    _share_embedding(model, head, matrices, packed[head.name])
    for node in products:
        kind = matrices[node.input[1]].data_type
        _replace_product(model, node, packed[node.name], kind, grid.level)
    _save(model, directory)


def _matrices(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {each.name: each for each in model.graph.initializer if each.data_type in _FLOATS and len(each.dims) == 2}


def _resolve_transposed(model: onnx.ModelProto) -> None:
    """Gives each MatMul with a constant matrix's transpose, as torch.onnx writes tied heads, that transpose itself."""
    matrices = _matrices(model)
    transposes = {
        node.output[0]: node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in matrices
    }
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in transposes]
    for name in dict.fromkeys(node.input[1] for node in products):
        turned = np.ascontiguousarray(numpy_helper.to_array(matrices[transposes[name].input[0]]).T)
        model.graph.initializer.append(numpy_helper.from_array(turned, f"{name}.matrix"))
    for node in products:
        node.input[1] = f"{node.input[1]}.matrix"
    for name, transpose in transposes.items():
        if not any(name in node.input for node in model.graph.node):
            model.graph.node.remove(transpose)


def _head(model: onnx.ModelProto, products: Sequence[onnx.NodeProto]) -> onnx.NodeProto:
    """Returns the product that gives the logits: the nearest before them, as a bias or a scale may come after it.

    Raises:
        RuntimeError: the graph has no logits, or that product is none of those that can be quantized.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    waiting, seen = ["logits"], {"logits"}
    while waiting:
        node = makers.get(waiting.pop(0))
        if node is None:
            continue
        if node.op_type in _PRODUCTS:
            if found := next((each for each in products if each.output[0] == node.output[0]), None):
                return found
            raise RuntimeError(
                f"the head, {node.op_type} {node.name}, cannot be quantized; expected a MatMul with a constant matrix"
            )
        waiting.extend(name for name in node.input if name not in seen)
        seen.update(node.input)
    raise RuntimeError("no product of the graph gives the logits; expected a head to quantize")


def _is_product(node: onnx.NodeProto, matrices: dict[str, Any]) -> bool:
    constant = node.op_type == "MatMul" and node.input[1] in matrices
    return constant and not FACTOR.fullmatch(node.input[1])


def _weight(matrix: onnx.TensorProto) -> torch.Tensor:
    """Returns W, (d_out, d_in), of the stored Wᵀ."""
    return torch.from_numpy(numpy_helper.to_array(matrix).astype(np.float32).T)


def _packed(weight: torch.Tensor, gram: torch.Tensor | None, bits: int, grid: Grid) -> GridWeight:
    if gram is None:
        return quantize(weight, bits, keep=grid.keep)
    return round_compensated(weight, gram, bits)


def _with_grams(
    directory: Path,
    products: Sequence[onnx.NodeProto],
    matrices: dict[str, Any],
    calibration: Sequence[Sequence[int]],
    provider: str,
    watch: Progress,
) -> Iterator[tuple[onnx.NodeProto, torch.Tensor | None]]:
    """Yields each product with the Gram matrix of its input; without calibration, with None."""
    if not calibration:
        yield from ((node, None) for node in products)
        return
    widths = {node.input[0]: matrices[node.input[1]].dims[0] for node in products}
    pending = list(widths)
    while pending:
        names: list[str] = []
        while pending and (not names or 4 * sum(widths[name] ** 2 for name in [*names, pending[0]]) <= _GRAM_BYTES):
            names.append(pending.pop(0))
        grams = _measure_grams(directory, names, calibration, provider, watch)
        yield from ((node, grams[node.input[0]]) for node in products if node.input[0] in grams)


def _measure_grams(
    directory: Path, names: Sequence[str], calibration: Sequence[Sequence[int]], provider: str, watch: Progress
) -> dict[str, torch.Tensor]:
    """Runs the float model on the calibration texts, with the products' inputs as outputs."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    kind = next(each.data_type for each in model.graph.initializer if each.data_type in _FLOATS)
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in names)
    onnx.save_model(model, directory / _CALIBRATION)
    try:
        session = OnnxModel(directory, provider, file=_CALIBRATION)
        grams: dict[str, torch.Tensor] = {}
        waiting: list[Sequence[np.ndarray]] = []
        for done, ids in enumerate(calibration):
            watch("calibrating", done, len(calibration))
            waiting.append(session.outputs(np.array(ids, dtype=np.int64), names))
            if sum(len(each[0]) for each in waiting) >= _TOKENS_AT_ONCE or done == len(calibration) - 1:
                for name, values in zip(names, map(np.concatenate, zip(*waiting, strict=True)), strict=True):
                    product = torch.from_numpy(values.T @ values)
                    grams[name] = grams[name].add_(product) if name in grams else product
                waiting.clear()
        watch("calibrating", len(calibration), len(calibration))
        return grams
    finally:
        (directory / _CALIBRATION).unlink()


def _most_sensitive(
    products: Sequence[onnx.NodeProto], matrices: dict[str, Any], errors: dict[str, float], share: float
) -> list[onnx.NodeProto]:
    """Returns the products with the largest errors that together hold at most a share of the numbers."""
    sizes = {node.name: int(np.prod(matrices[node.input[1]].dims)) for node in products}
    room = share * sum(sizes.values())
    chosen = []
    for node in sorted(products, key=lambda node: -errors.get(node.name, 0.0)):
        room -= sizes[node.name]
        if room < 0:
            break
        chosen.append(node)
    return chosen


def _replace_product(model: onnx.ModelProto, node: onnx.NodeProto, packed: GridWeight, kind: int, level: int) -> None:
    """Turns a MatMul into a MatMulNBits; the matrix goes when nothing else reads it."""
    x, name = node.input[0], node.input[1]
    stored = _store(model, name, packed, kind)
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    del node.input[:]
    del node.attribute[:]
    node.input.extend([x, *stored])
    (d_out, d_in), bits = packed.shape, packed.bits
    numbers = {"K": d_in, "N": d_out, "bits": bits, "block_size": BLOCK, "accuracy_level": level}
    node.attribute.extend(helper.make_attribute(key, value) for key, value in numbers.items())
    if not any(name in each.input for each in model.graph.node):
        matrix = next(each for each in model.graph.initializer if each.name == name)
        model.graph.initializer.remove(matrix)


def _store(model: onnx.ModelProto, name: str, packed: GridWeight, kind: int) -> list[str]:
    """Adds codes, scales and zero points as initializers, once, and returns their names."""
    tensors = {
        f"{name}.codes": packed.codes.numpy(),
        f"{name}.scales": packed.scales.numpy().astype(helper.tensor_dtype_to_np_dtype(kind)),
        f"{name}.zeros": packed.zeros.numpy(),
    }
    if not any(each.name == f"{name}.codes" for each in model.graph.initializer):
        model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in tensors.items())
    return list(tensors)


def _share_embedding(
    model: onnx.ModelProto, head: onnx.NodeProto, matrices: dict[str, Any], packed: GridWeight
) -> None:
    """Lets the embedding read the head's codes where both are the same matrix."""
    name = head.input[1]
    transposed = {
        node.output[0]: node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] == name
    }
    gathers = [node for node in model.graph.node if node.op_type == "Gather"]
    for gather in gathers:
        table = gather.input[0]
        if table not in transposed and not _is_transpose(matrices.get(table), matrices[name]):
            continue
        nodes = _quantized_gather(model, gather, name, packed, matrices[name].data_type)
        place = list(model.graph.node).index(gather)
        model.graph.node.remove(gather)
        for offset, node in enumerate(nodes):
            model.graph.node.insert(place + offset, node)
        if table in transposed:
            model.graph.node.remove(transposed[table])
        elif not any(table in node.input for node in model.graph.node):
            model.graph.initializer.remove(matrices[table])


def _is_transpose(table: onnx.TensorProto | None, matrix: onnx.TensorProto) -> bool:
    if table is None or list(table.dims) != list(matrix.dims)[::-1]:
        return False
    return np.array_equal(numpy_helper.to_array(table), numpy_helper.to_array(matrix).T)


def _quantized_gather(
    model: onnx.ModelProto, gather: onnx.NodeProto, name: str, packed: GridWeight, kind: int
) -> list[onnx.NodeProto]:
    codes, scales, zeros = _store(model, name, packed, kind)
    (rows, width), padded = packed.shape, packed.codes.shape[1] * BLOCK
    constants = {f"{name}.rows": [rows, padded]}
    if padded != width:
        constants |= {f"{name}.first": [0], f"{name}.width": [width], f"{name}.last": [-1]}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, dtype=np.int64), key) for key, value in constants.items()
    )
    output = gather.output[0]
    whole = output if padded == width else f"{output}.padded"
    nodes = [
        helper.make_node("Reshape", [codes, f"{name}.rows"], [f"{name}.table"], name=f"{name}.reshape"),
        helper.make_node(
            "GatherBlockQuantized",
            [f"{name}.table", gather.input[1], scales, zeros],
            [whole],
            name=gather.name,
            domain="com.microsoft",
            bits=packed.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]
    if padded != width:
        cut = [whole, f"{name}.first", f"{name}.width", f"{name}.last"]
        nodes.append(helper.make_node("Slice", cut, [output], name=f"{name}.cut"))
    return nodes


def _save(model: onnx.ModelProto, directory: Path) -> None:
    if not any(each.domain == "com.microsoft" for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (directory / DATA).unlink(missing_ok=True)
    onnx.save_model(model, directory / "model.onnx", save_as_external_data=True, location=DATA)
