"""Every extra installs from wheels alone, on x86-64 and 64-bit Arm, for every Python that fedtune runs on."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [name for name in PROJECT["optional-dependencies"] if name not in ("all", "dev")]


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_wheels_for_a_machine_and_a_python(extra: str, python: str, machine: str) -> None:
    """The package index has them, in the versions of constraints.txt."""
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", "--quiet", "--no-config", "--only-binary", ":all:", "--extra", extra]
    command += ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_34"]
    command += ["--constraint", "constraints.txt", "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "numpy==" in done.stdout
