"""float16 on CPUs: half the bytes on disk and on the wire; the arithmetic stays float32, as CPUs do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_DATA = "model.onnx.data"


def store_in_half(directory: str) -> None:
    """Stores the float32 matrices of a written model as float16, each with a cast that loading folds away.

    Raises:
        OverflowError: a weight is beyond float16's range.
    """
    path = Path(directory) / "model.onnx"
    model = onnx.load(path)
    casts = []
    for initializer in model.graph.initializer:
        if initializer.data_type != TensorProto.FLOAT or len(initializer.dims) < 2:
            continue
        with np.errstate(over="ignore"):
            half = numpy_helper.to_array(initializer).astype(np.float16)
        if not np.isfinite(half).all():
            raise OverflowError(f"{initializer.name} has weights beyond float16's range")
        name, stored = initializer.name, f"{initializer.name}.half"
        initializer.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], name=f"{name}.widen", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (path.parent / _DATA).unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=_DATA)
