"""The export of an adapter apart from its base: a base whose factors are inputs, and small files with the factors.

In the base's graph, each factor is an initializer and an input of the same name. An initializer is the input's
default, so the base alone runs with zeros, and onnxruntime-genai swaps in what an `.onnx_adapter` file holds.

    lora_A.MatMul.weight: Aᵀ, (d_in, R)         lora_B.MatMul.weight: s · Bᵀ, (R, d_out)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime  # type: ignore[import-untyped]
from onnx import numpy_helper

from fedtune.core.adapter.layout import AdapterLayout
from fedtune.core.errors import ModelError
from fedtune.server.export.builder import OnlyMergedError
from fedtune.server.export.grid_graph import DATA, FACTOR
from fedtune.server.export.merge import FinishedRun

_BLOCKS = {"attn": "self_attn"}


def modules(layout: AdapterLayout) -> list[list[Any]]:
    """Returns the layout as a manifest stores it; an adapter fits a base if and only if both state the same layout."""
    return [[module.name, module.d_in, module.d_out, layout.rank] for module in layout.modules]


def open_inputs(directory: Path, layout: AdapterLayout) -> None:
    """Turns the factors of a written base into inputs whose default is zero.

    Raises:
        OnlyMergedError: the graph does not hold the factors of every module.
    """
    model = onnx.load(directory / "model.onnx")
    for initializer in _factors(model, layout):
        zeros = np.zeros(tuple(initializer.dims), dtype=onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type))
        initializer.CopyFrom(numpy_helper.from_array(zeros, initializer.name))
        shape = list(initializer.dims)
        model.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, shape))
    _save(model, directory)


def fill_in(directory: Path, run: FinishedRun) -> None:
    """Gives the factors of a written model the run's values, beside the base's products.

    Raises:
        OnlyMergedError: the graph does not hold the factors of every module.
    """
    model = onnx.load(directory / "model.onnx")
    for initializer in _factors(model, run.layout):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type)
        value = _value(run, initializer.name, list(initializer.dims), dtype)
        initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    _save(model, directory)


def write_adapter(path: Path, directory: Path, run: FinishedRun) -> None:
    """Writes a run's adapter for a base that `open_inputs` has prepared.

    Raises:
        ModelError: the base takes other factors than the run's.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # onnxruntime warns about inputs with defaults, which are intended here
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    parameters = {}
    for node in session.get_overridable_initializers():
        if FACTOR.fullmatch(node.name):
            dtype = np.float16 if node.type == "tensor(float16)" else np.float32
            value = _value(run, node.name, node.shape, dtype)
            parameters[node.name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(path))


def _factors(model: onnx.ModelProto, layout: AdapterLayout) -> list[onnx.TensorProto]:
    """Returns the initializers that are factors; raises OnlyMergedError unless there are two for every module."""
    found = [initializer for initializer in model.graph.initializer if FACTOR.fullmatch(initializer.name)]
    if len(found) != 2 * len(layout.modules):
        raise OnlyMergedError(
            f"the written base has {len(found)} of {2 * len(layout.modules)} factors apart from its weights, "
            "so that this architecture's adapters can only be merged"
        )
    return found


def _value(run: FinishedRun, name: str, shape: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
    """Returns the value of a factor in the graph's layout.

    Raises:
        ModelError: the run has no such factor, or one of another shape.
    """
    match = FACTOR.fullmatch(name)
    assert match is not None
    layer, block, projection, letter = match.groups()
    pairs = run.layout.pairs(run.adapter)
    ending = f"layers.{layer}.{_BLOCKS.get(block, block)}.{projection}"
    module = next((each for each in pairs if each.endswith(ending)), "")
    if not module:
        raise ModelError(f"the written base takes {name}, which the adapter does not have")
    lora_a, lora_b = pairs[module]
    factor = lora_a.T if letter == "A" else run.layout.scaling * lora_b.T
    if list(factor.shape) != list(shape):
        raise ModelError(f"the written base's {name} has shape {list(shape)}; expected {list(factor.shape)}")
    return np.ascontiguousarray(factor, dtype=dtype)


def _save(model: onnx.ModelProto, directory: Path) -> None:
    (directory / DATA).unlink(missing_ok=True)
    onnx.save_model(model, directory / "model.onnx", save_as_external_data=True, location=DATA)
