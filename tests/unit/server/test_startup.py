"""Help and mistakes are answered before torch, transformers or Flower are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "flwr", "ray")
# The command line, and afterwards the heavy packages that it has imported, as the last line of the output.
PROGRAM = f"""
import atexit, sys
from fedtune.server.cli import main
atexit.register(lambda: print("imported:", *(name for name in {HEAVY} if name in sys.modules)))
main()
"""

HELPS = [
    (*command, "--help")
    for command in (
        (),
        *((name,) for name in ("simulate", "resume", "report", "plan", "export", "serve", "chat", "server", "client")),
        *(("server", name) for name in ("init", "renew", "enroll", "revoke", "start", "stop", "submit", "status")),
        *(("client", name) for name in ("join", "start", "stop", "status", "pull", "rollback", "leave")),
    )
]

MISTAKES = [
    (("simulate", "typo.toml"), "federation.ruonds: unknown key"),
    (("simulate", "none.toml"), "none.toml: cannot be read"),
    (("simulate", "--set", "training.local_steps=1", "--set", "training.local_epochs=1"), "expected one of them"),
    (("simulate", "--set", "data.train=none/*.jsonl"), "no such file"),
    (("simulate", "job.toml", "--set", "data.train=broken.jsonl"), "broken.jsonl:1: is not JSON"),
    (("simulate", "--set", "data.evaluation=none.jsonl"), "none.jsonl: cannot be read"),
    (("simulate", "--set", "model.base=/nowhere"), "/nowhere: not a directory"),
    (("simulate", "--set", "model.base=empty"), "it has no config.json"),
    (("simulate", "--set", "federation.clients_per_round=0.2"), "secure_aggregation: "),
    (("simulate", "--fleet", "none.toml"), "none.toml: cannot be read"),
    (("simulate", "--out", "full"), "full: exists already; it is not a run directory"),
    (("resume", "/nowhere"), "/nowhere: not a run directory"),
    (("report", "/nowhere"), "/nowhere: not a run directory"),
    (("plan", "--base", "/nowhere"), "/nowhere: not a directory"),
    (("plan", "--data", "none.jsonl"), "none.jsonl: no such file"),
    (("plan", "--job", "typo.toml"), "federation.ruonds: unknown key"),
    (("chat", "/nowhere"), "/nowhere: not an exported directory"),
    (("serve", "/nowhere"), "/nowhere: not an exported directory"),
    (("client", "join", "/nowhere", "--data", "broken.jsonl", "--home", "home"), "/nowhere: cannot read a bundle"),
    (("client", "start", "--home", "none"), "none: no device lives here"),
    (("server", "start", "--home", "none"), "none: no server lives here"),
    (("server", "submit", "typo.toml", "--home", "fleet"), "federation.ruonds: unknown key"),
    (("server", "submit", "--set", "model.base=/nowhere", "--home", "fleet"), "/nowhere: not a directory"),
    (("server", "submit", "--set", "data.evaluation=none.jsonl", "--home", "fleet"), "none.jsonl: cannot be read"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job that has a typo, data that is broken, and a fleet's server."""
    path = tmp_path_factory.mktemp("startup")
    (path / "typo.toml").write_text("[federation]\nruonds = 3\n")
    (path / "job.toml").touch()
    (path / "broken.jsonl").write_text("no JSON\n")
    (path / "empty").mkdir()
    (path / "full").mkdir()
    (path / "full" / "something").touch()
    done = _run(path, "server", "init", "--address", "localhost:8443", "--home", "fleet")
    assert done.returncode == 0, done.stderr
    return path


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "300"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_is_shown_without_heavy_packages(folder: Path, arguments: tuple[str, ...]) -> None:
    done = _run(folder, *arguments)
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert done.stdout.endswith("imported:\n")


@pytest.mark.parametrize(("arguments", "complaint"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_named_without_heavy_packages(folder: Path, arguments: tuple[str, ...], complaint: str) -> None:
    done = _run(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert done.stdout.endswith("imported:\n")
