"""The process itself: the environment that libraries read, the signals that end it, and the facts for a summary.

prepare_environment()               # before Flower or torch is imported; child processes inherit it
keep_freed_memory()                 # where many clients are trained, one after another
with stopping():                    # raises Stopped on SIGTERM and Ctrl-C
    serve()
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow down a busy machine severely
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def prepare_environment() -> None:
    """Sets the variables that the environment does not set already."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_MMAP_THRESHOLD, _LARGEST_TRIM_THRESHOLD = 32 << 20, (1 << 31) - 1


def keep_freed_memory() -> None:
    """Has this process and its forks keep the memory that they free, where the C library is glibc.

    By default glibc hands what is free at the end of its heap back to the kernel, after every training step some ten
    MiB, which the kernel clears again, page by page, in the next one: a twelfth of the time on the bundled model.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        adjust(_M_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)


class Stopped(BaseException):
    """SIGTERM or Ctrl-C asks the process to end; raised wherever the main thread is, so that it ends at once."""


@contextmanager
def stopping() -> Iterator[None]:
    """Raises Stopped in the main thread on SIGTERM and SIGINT; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        raise Stopped

    before: dict[signal.Signals, Callable[..., object] | int | None] = {
        each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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
    """Returns the peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_MB


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages on which results depend, if they are installed."""
    stated = {"python": platform.python_version()}
    for package in _STATED:
        try:
            stated[package] = version(package)
        except PackageNotFoundError:
            continue
    return stated
