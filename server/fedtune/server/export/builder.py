"""Writing ONNX in a child process, since builders log a lot, need as much memory as the model, and may crash.

    writer = build(Build(source, out, "int4", RECIPES["int4"][0]), path, watch)

The child writes a float graph with onnxruntime-genai's model builder, or with `torch.onnx` for architectures that the
builder does not know, and then quantizes it as the recipe says (grid_graph.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedtune.core.errors import FedtuneError, ModelError, RunError
from fedtune.core.protocol.model_manifest import Format
from fedtune.server.export.grid_graph import Grid, Progress


class OnlyMergedError(ModelError):
    """A base's graph cannot be written with the adapter's factors beside its weights, in whatever format."""


@dataclass(frozen=True)
class Recipe:
    """The way to store a model's weights in a format.

    Args:
        name: a description for people.
        grid: the way to quantize; None for float weights.
        calibrated: whether errors are compensated for the inputs that calibration texts give.
        beside: whether the adapter's factors stay beside the base's own numbers, in float, instead of being merged.
    """

    name: str
    grid: Grid | None = None
    calibrated: bool = False
    beside: bool = False

    def exact_products(self) -> Recipe:
        """Returns the same recipe with activations in float32; float weights have no other."""
        if self.grid is None or self.grid.level == 1:
            return self
        return replace(self, name=f"{self.name}; {_EXACT}", grid=replace(self.grid, level=1))

    def uncalibrated(self) -> Recipe:
        """Returns the same recipe by least squares over weights alone."""
        return replace(self, name=self.name.replace(_COMPENSATED, "least squares"), calibrated=False)


_FOUR, _EXACT, _COMPENSATED = "4 bits, head in 8 bits", "float32 products", "errors compensated"
# Tried in this order until one passes the gate; each costs more bytes than its predecessor. Float32 products are
# no next try: onnxruntime unpacks matrices of 8 bits for every token then, far slower than float weights.
RECIPES: dict[Format, tuple[Recipe, ...]] = {
    "fp32": (Recipe("float32"),),
    "fp16": (Recipe("float16 weights"),),  # CPUs convert them to float32 when the model is loaded
    "int8": (Recipe("8 bits, least squares", Grid(8)),),
    "int4": (
        Recipe(f"{_FOUR}, {_COMPENSATED}", Grid(4), calibrated=True),
        Recipe(f"{_FOUR}, as has the most sensitive third; {_COMPENSATED}", Grid(4, wide=1 / 3), calibrated=True),
    ),
}
# Where the base was trained in the served grid its codes are kept, so that only the factors' product is added to them.
KEPT = Recipe(f"{_FOUR}, the trained base's own; adapter beside it in float32", Grid(4, keep=True), beside=True)


@dataclass(frozen=True)
class Build:
    """One model to write.

    Args:
        source: a transformers directory of float32 weights.
        out: the directory for the ONNX model; it must not exist.
        provider: the execution provider to build for, in the builder's words: "cpu", "cuda", "dml", ...
        options: options for the model builder, in addition to the recipe's.
        adapter: a peft directory whose factors stay apart from the weights; None for none.
        calibration: token ids of texts for a calibrated recipe; empty for none.
    """

    source: Path
    out: Path
    format: Format
    recipe: Recipe
    provider: str = "cpu"
    options: dict[str, str] = field(default_factory=dict)
    adapter: Path | None = None
    calibration: tuple[tuple[int, ...], ...] = ()


def build(wanted: Build, log: Path, watch: Progress) -> str:
    """Writes a model in a child process.

    Args:
        log: the file to which the child's output is appended.
        watch: is told what is done, and how many of how many pieces.

    Returns:
        The writer: "onnxruntime-genai" or "torch.onnx".

    Raises:
        OnlyMergedError: the model builder cannot write the graph that an adapter apart needs.
        RunError: the model could not be written; the message has the reason.
    """
    command = [sys.executable, "-m", "fedtune.server.export.build_child"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    last = ""
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        json.dump(asdict(wanted), child.stdin, default=str)
        child.stdin.close()
        for last in child.stdout:
            if progress := json.loads(last).get("progress"):
                watch(*progress)
    if child.returncode == 0:
        return str(json.loads(last)["writer"])
    raise _failure(last, child.returncode, log)


def _failure(last: str, status: int, log: Path) -> FedtuneError:
    """Returns the error with the child's own reason, or with how it ended."""
    try:
        answer = json.loads(last)
        reason = str(answer["error"])
    except (ValueError, KeyError, TypeError):
        how = f"signal {-status}" if status < 0 else f"status {status}"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        tail = " | ".join(line.strip() for line in lines if line.strip())[-400:]
        return RunError(f"the ONNX model could not be written: the builder ended with {how} (out of memory?): {tail}")
    if answer.get("only_merged"):
        return OnlyMergedError(reason)
    return RunError(f"the ONNX model could not be written: {reason}")
