"""The export of an adapter apart from its base: a base whose factors are inputs, and small files with the factors.

In the base's graph, each factor is an initializer and an input of the same name. An initializer is the input's
default, so the base alone runs with zeros, and onnxruntime-genai swaps in what an `.onnx_adapter` file holds.

    lora_A.MatMul.weight: Aᵀ, (d_in, R)         lora_B.MatMul.weight: s · Bᵀ, (R, d_out)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from onnx import numpy_helper

from fedtune.core.adapter.layout import AdapterLayout
from fedtune.core.errors import ModelError
from fedtune.server.export.merge import FinishedRun

_FACTOR = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.lora_([AB])\.MatMul\.weight")
_BLOCKS = {"attn": "self_attn"}
_DATA = "model.onnx.data"


def modules(layout: AdapterLayout) -> list[list[Any]]:
    """Returns the layout as a manifest stores it; an adapter fits a base if and only if both state the same layout."""
    return [[module.name, module.d_in, module.d_out, layout.rank] for module in layout.modules]


def open_inputs(directory: Path, layout: AdapterLayout) -> None:
    """Turns the factors of a written base into inputs whose default is zero.

    Raises:
        ModelError: the graph does not hold the factors of every module.
    """
    model = onnx.load(directory / "model.onnx")
    found = 0
    for initializer in model.graph.initializer:
        if _FACTOR.fullmatch(initializer.name):
            zeros = np.zeros(tuple(initializer.dims), dtype=onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type))
            initializer.CopyFrom(numpy_helper.from_array(zeros, initializer.name))
            shape = list(initializer.dims)
            model.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, shape))
            found += 1
    if found != 2 * len(layout.modules):
        raise ModelError(
            f"the written base has {found} of {2 * len(layout.modules)} factors apart from its weights; "
            "this architecture's adapters can only be merged"
        )
    (directory / _DATA).unlink(missing_ok=True)
    onnx.save_model(model, directory / "model.onnx", save_as_external_data=True, location=_DATA)


def write_adapter(path: Path, directory: Path, run: FinishedRun) -> None:
    """Writes a run's adapter for a base that `open_inputs` has prepared.

    Raises:
        ModelError: the base takes other factors than the run's.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # onnxruntime warns about inputs with defaults, which are intended here
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    pairs = run.layout.pairs(run.adapter)
    parameters = {}
    for node in session.get_overridable_initializers():
        if not (match := _FACTOR.fullmatch(node.name)):
            continue
        layer, block, projection, letter = match.groups()
        name = next(
            (name for name in pairs if name.endswith(f"layers.{layer}.{_BLOCKS.get(block, block)}.{projection}")), ""
        )
        if not name:
            raise ModelError(f"{directory}: takes {node.name}, which the adapter does not have")
        lora_a, lora_b = pairs[name]
        factor = lora_a.T if letter == "A" else run.layout.scaling * lora_b.T
        if list(factor.shape) != node.shape:
            raise ModelError(f"{directory}: {node.name} has shape {node.shape}; expected {list(factor.shape)}")
        dtype = np.float16 if node.type == "tensor(float16)" else np.float32
        value = np.ascontiguousarray(factor, dtype=dtype)
        parameters[node.name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(path))
