"""Meters of this process's memory, as the kernel counts it.

meter = ProcessMeter()
before = meter.reset()
peak = meter.peak() - before
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from fedtune.core.errors import RunError

_MARK_RESET = "5"


class ProcessMeter:
    """Meters the resident set of this process and its high-water mark."""

    def reset(self) -> int:
        """Returns free heap memory to the system and resets the peak; returns the bytes of the resident set."""
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)
        Path("/proc/self/clear_refs").write_text(_MARK_RESET)
        return _status("VmRSS")

    def peak(self) -> int:
        """Returns the peak since the reset, in bytes."""
        return _status("VmHWM")


class KeptMeter(ProcessMeter):
    """Meters the memory that the kernel must keep: the resident set without files that are mapped after the meter is
    made, whose pages it may drop at any time.

    The kernel has no high-water mark of that; it is the resident set's, less the mapped pages at the time of the call.
    """

    def __init__(self) -> None:
        self._files = _status("RssFile")

    def reset(self) -> int:
        """Resets the peak, as the base class does; returns the bytes that must be kept now."""
        return super().reset() - self._mapped()

    def peak(self) -> int:
        """Returns the peak since the reset, in bytes."""
        return super().peak() - self._mapped()

    def _mapped(self) -> int:
        return max(0, _status("RssFile") - self._files)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise RunError(f"/proc/self/status has no {key}; memory cannot be measured here")
