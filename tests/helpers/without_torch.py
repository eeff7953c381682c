"""An environment for processes that cannot import torch, as on a device without it, whatever is installed here."""

from __future__ import annotations

import os
from pathlib import Path

_ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "bitsandbytes", "onnx", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def environment_without_torch(folder: Path) -> dict[str, str]:
    """Returns the variables of a process in which, and in whose children, torch and its companions are missing.

    Args:
        folder: a folder of the test's own, for the module that Python runs at its start.
    """
    (folder / "sitecustomize.py").write_text(_ABSENT, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder), "XDG_STATE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
