"""Facts about this process that a summary states."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

_STATED = (
    "fedtune",
    "flwr",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "ray",
    "onnxruntime",
    "onnxruntime-genai",
)
_RSS_UNITS_PER_MB = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss counts bytes there, KiB elsewhere


def peak_rss_mb() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_MB


def versions() -> dict[str, str]:
    """Versions of what the result depends on; a package that is not installed is left out."""
    stated = {"python": platform.python_version()}
    for package in _STATED:
        try:
            stated[package] = version(package)
        except PackageNotFoundError:
            continue
    return stated
