"""A process tells its C library what to do with memory that is free."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BUFFERS = """
import resource, sys
from fedtune.core.host.process import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    buffers = [bytearray(b"x") * (4 << 20) for _ in range(8)]
step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_that_a_step_has_freed_is_there_for_the_next() -> None:
    def faults(choice: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", BUFFERS, choice], text=True))

    assert faults("keep") < faults("leave") / 10
