"""Extras: devices that answer, or train on an edge pack, need no torch, no Flower, little room, no newest versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "transformers", "flwr", "sqlalchemy", "grpc")
DEVICE = (["client", "join", "--help"], ["client", "status"], ["client", "start"])

LIGHT = ("codec", "core", "manifest", "secagg")  # tests of the code that every device runs


def install(folder: Path, extra: str, *options: str) -> tuple[Path, Path]:
    """Installs an extra from a clone into an environment of its own; returns the environment and the clone."""
    uv, place, source = str(Path(sys.executable).with_name("uv")), folder / "venv", folder / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(place)], check=True)
    command = [uv, "pip", "install", "--quiet", "--no-config", "--python", str(place / "bin" / "python")]
    subprocess.run([*command, *options, f".[{extra}]"], cwd=source, check=True)
    return place, source


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "most_mb", "commands"),
    [("inference", 290, (["serve", "--help"], ["chat", "--help"], *DEVICE)), ("edge", 230, DEVICE)],
)
def test_a_small_device_installs_neither_torch_nor_flower(
    tmp_path: Path, extra: str, most_mb: int, commands: tuple[list[str], ...]
) -> None:
    place, _ = install(tmp_path, extra, "--constraint", "constraints.txt")
    (packages,) = place.glob("lib/python*/site-packages")
    assert not [name for name in ABSENT if (packages / name).exists()]
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"[{extra}]: {size / 1e6:.0f} MB")
    assert size <= most_mb * 1e6
    for command in commands:
        done = subprocess.run(
            [str(place / "bin" / "fedtune"), *command],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        assert done.returncode == 0 or "no device here" in done.stderr


@pytest.mark.slow
def test_the_lowest_versions_that_it_accepts_pass_the_tests_of_what_every_device_runs(tmp_path: Path) -> None:
    place, source = install(tmp_path, "inference", "--resolution", "lowest-direct")
    python, uv = str(place / "bin" / "python"), str(Path(sys.executable).with_name("uv"))
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-config", "--python", python, "pytest", "hypothesis"], check=True
    )
    command = [python, "-m", "pytest", "-q", *(f"tests/unit/{folder}" for folder in LIGHT)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
