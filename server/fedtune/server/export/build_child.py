"""The child process of `builder.build`: it reads a build as JSON, answers in lines of JSON and logs on stderr.

{"progress": ["quantizing", 3, 151]}    {"writer": "onnxruntime-genai"}    {"error": "MemoryError: ..."}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from fedtune.server.export.builder import OnlyMergedError
from fedtune.server.export.grid_graph import DATA, Grid, Progress, rewrite
from fedtune.server.export.onnx_model import OnnxModel

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Answers and ends with status 0, or 1 after an error."""
    _end_with_parent()
    # Libraries that print shall print into the log: descriptor 1 becomes 2, and only the answer goes to the old 1.
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(task: str, done: int, count: int) -> None:
        print(json.dumps({"progress": [task, done, count]}), file=answer)

    result: dict[str, Any]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = {"writer": build_one(json.load(sys.stdin), tell)}
    except OnlyMergedError as error:
        traceback.print_exc()
        result = {"error": str(error), "only_merged": True}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {_first_line(error)}"}
    print(json.dumps(result), file=answer)
    answer.close()
    sys.exit("error" in result)


def _end_with_parent() -> None:
    """Asks the kernel to end this process when its parent ends, even by kill -9; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def build_one(wanted: dict[str, Any], watch: Progress) -> str:
    """Writes one model; `wanted` is a `builder.Build` as a table. Returns the name of the writer."""
    directory, grid = Path(wanted["out"]), wanted["recipe"]["grid"]
    # onnxruntime multiplies no float16 on CPUs, and the builder's float16 graph fails there with grouped queries.
    halved = wanted["format"] == "fp16" and wanted["provider"] == "cpu"
    precision = "fp32" if halved or (grid and wanted["provider"] == "cpu") else "fp16" if grid else wanted["format"]
    watch("writing the float graph", 0, 1)
    writer = _write_float(wanted | {"format": precision})
    watch("writing the float graph", 1, 1)
    if halved:
        _store_in_half(directory)
    if grid:
        calibration = wanted["calibration"] if wanted["recipe"]["calibrated"] else ()
        rewrite(directory, Grid(**grid), calibration, wanted["provider"], watch)
    return writer


def _write_float(wanted: dict[str, Any]) -> str:
    """Writes the float graph and returns the name of its writer.

    Raises:
        OnlyMergedError: an adapter apart is wanted, which torch.onnx does not write, and the model builder fails.
    """
    try:
        _build_with_genai(wanted)
        # Some details of a known architecture show only here, such as a head size that an operator does not take.
        OnnxModel(Path(wanted["out"]), wanted["provider"]).logits(np.zeros(2, dtype=np.int64))
    except (OSError, MemoryError):  # a full disk stops the other writer too
        raise
    except Exception as error:  # NotImplementedError for an unknown architecture, anything for a detail of a known one
        if wanted["adapter"] is not None:
            detail = "" if isinstance(error, NotImplementedError) else f" ({_first_line(error)})"
            raise OnlyMergedError(
                f"onnxruntime-genai's model builder cannot write this architecture{detail}, so that its adapters can "
                "only be merged"
            ) from error
        if wanted["provider"] != "cpu" or wanted["options"]:
            raise
        print("not by the model builder, hence by torch.onnx:", file=sys.stderr)
        traceback.print_exc()
        shutil.rmtree(wanted["out"], ignore_errors=True)
    else:
        return "onnxruntime-genai"
    from fedtune.server.export import generic

    generic.build(wanted["source"], wanted["out"])
    return "torch.onnx"


def _store_in_half(directory: Path) -> None:
    """Stores the float32 matrices of a written model as float16, each with a cast that is folded at loading.

    This halves the bytes on disk and on the wire; the arithmetic stays float32, which CPUs support.

    Raises:
        OverflowError: a weight is beyond float16's range.
    """
    path = directory / "model.onnx"
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
    (path.parent / DATA).unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=DATA)


def _build_with_genai(wanted: dict[str, Any]) -> None:
    from onnxruntime_genai.models import builder  # type: ignore[import-untyped]
    from transformers import AutoConfig

    source, out = wanted["source"], wanted["out"]
    config: Any = AutoConfig.from_pretrained(source, local_files_only=True)
    options = {"hf_token": "false", **wanted["options"]}
    if config.tie_word_embeddings and wanted["adapter"] is None:
        options.setdefault("shared_embeddings", "true")
    if wanted["adapter"] is not None:
        options["adapter_path"] = wanted["adapter"]
    pairs = [f"{key}={value}" for key, value in options.items()]
    with tempfile.TemporaryDirectory() as cache:
        where = (None, source, out, wanted["format"], wanted["provider"], cache)
        builder.create_model(*where, **builder.parse_extra_options(*where, pairs))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    main()
