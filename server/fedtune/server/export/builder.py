"""Writing ONNX in a child process, since builders log a lot, need as much memory as the model, and may crash.

    attempts = build([Build(source, out, "int4", Recipe("RTN, blocks of 32"))], log=path)

The child tries onnxruntime-genai's model builder first, and `torch.onnx` for architectures that it does not know.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedtune.core.errors import RunError
from fedtune.core.protocol.model_manifest import Format


@dataclass(frozen=True)
class Recipe:
    """The way to quantize a model to a format.

    Args:
        name: a description for people.
        options: the model builder's extra options.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)


# Tried in this order until one passes the gate; each costs more bytes or more time to quantize than its predecessor.
RECIPES: dict[Format, tuple[Recipe, ...]] = {
    "fp32": (Recipe("float32"),),
    "fp16": (Recipe("float16 weights"),),  # CPUs convert them to float32 when the model is loaded
    "int8": (
        Recipe("8 bits, round to nearest, blocks of 32"),
        Recipe("8 bits, round to nearest, blocks of 32, float32 products", {"accuracy_level": "1"}),
    ),
    "int4": (
        Recipe("4 bits, round to nearest, blocks of 32"),
        Recipe("4 bits, k-quant, blocks of 32", {"algo_config": "k_quant"}),
        Recipe(
            "4 bits, k-quant, blocks of 32; head in 8 bits",
            {"algo_config": "k_quant", "matmul_mixed_precision": "last_matmul:int8"},
        ),
        Recipe(
            "4 bits, k-quant, blocks of 32; head and sensitive layers in 8 bits",
            {"algo_config": "k_quant", "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
        ),
    ),
}


@dataclass(frozen=True)
class Build:
    """One model to write.

    Args:
        source: a transformers directory of float32 weights.
        out: the directory for the ONNX model; it must not exist.
        provider: the execution provider to build for, in the builder's words: "cpu", "cuda", "dml", ...
        options: options for the model builder, in addition to the recipe's.
        adapter: a peft directory whose factors stay apart from the weights; None for none.
    """

    source: Path
    out: Path
    format: Format
    recipe: Recipe
    provider: str = "cpu"
    options: dict[str, str] = field(default_factory=dict)
    adapter: Path | None = None


def build(builds: Sequence[Build], log: Path) -> list[str]:
    """Writes the models one after the other in one child process.

    Args:
        log: the file to which the child's output is appended.

    Returns:
        The writer of each model: "onnxruntime-genai" or "torch.onnx".

    Raises:
        RunError: a model could not be written; the message has the reason and the log's name.
    """
    request = json.dumps([asdict(wanted) for wanted in builds], default=str)
    command = [sys.executable, "-m", "fedtune.server.export.build_child"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            command, input=request, stdout=subprocess.PIPE, stderr=file, text=True, env=environment, check=False
        )
    if done.returncode == 0:
        writers: list[str] = json.loads(done.stdout)
        return writers
    try:
        reason = str(json.loads(done.stdout)["error"])
    except (ValueError, KeyError, TypeError):
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        tail = " | ".join(line.strip() for line in lines if line.strip())[-400:]
        reason = f"the builder ended with {how} (out of memory?): {tail}"
    raise RunError(f"the ONNX model could not be written: {reason}; the builder's log is {log}")
