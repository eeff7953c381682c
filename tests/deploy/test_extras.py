"""What an extra installs: a device that only answers needs neither torch nor Flower, and little room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_MB = 290
ABSENT = ("torch", "transformers", "flwr", "sqlalchemy", "grpc")
COMMANDS = (["serve", "--help"], ["chat", "--help"], ["client", "join", "--help"], ["client", "status"])


@pytest.mark.slow
def test_a_device_that_answers_installs_neither_torch_nor_flower(tmp_path: Path) -> None:
    uv, place = str(Path(sys.executable).with_name("uv")), tmp_path / "venv"
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(place)], check=True)
    install = [uv, "pip", "install", "--quiet", "--no-config", "--python", str(place / "bin" / "python")]
    install += ["--constraint", "constraints.txt", ".[inference]"]
    subprocess.run(install, cwd=source, check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    assert not [name for name in ABSENT if (packages / name).exists()]
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"[inference]: {size / 1e6:.0f} MB")
    assert size <= MOST_MB * 1e6
    for command in COMMANDS:
        done = subprocess.run(
            [str(place / "bin" / "fedtune"), *command],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        assert done.returncode == 0 or "no device here" in done.stderr
