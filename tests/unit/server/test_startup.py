"""Help and mistakes are answered before torch, transformers or Flower are imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtune.demo import BASE_DIRECTORY

HEAVY = ("torch", "transformers", "flwr", "ray")
NO_HUB = "http://127.0.0.1:9"
# Runs the command lines of standard input one after the other; prints each one's output and its new imports.
PROGRAM = """
import contextlib, io, json, sys
from fedtune.server.cli import main
wanted, heavy = json.load(sys.stdin)
for words in wanted:
    before, out, err = set(sys.modules), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code or 0
    found = sorted((set(sys.modules) - before) & set(heavy))
    print(json.dumps([code, out.getvalue(), err.getvalue(), found]))
"""

HELPS = [
    (*command, "--help")
    for command in (
        (),
        *(
            (name,)
            for name in (
                "simulate",
                "resume",
                "report",
                "plan",
                "init",
                "check",
                "export",
                "serve",
                "chat",
                "fleet",
                "server",
                "client",
            )
        ),
        *(("server", name) for name in ("init", "renew", "publish", "offer", "start", "stop", "submit", "status")),
        *(("server", name) for name in ("jobs", "show", "cancel", "logs", "fetch")),
        *(("fleet", name) for name in ("init", "approve", "revoke", "renew", "rotate", "sign", "publish", "status")),
        *(("client", name) for name in ("join", "start", "stop", "status", "pull", "rollback", "leave")),
    )
]

MISTAKES = [
    (("simulate", "typo.toml"), "federation.ruonds: unknown key"),
    (("simulate", "unnamed.toml"), "model.base is not set; expected a Hugging Face model directory"),
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
    (("export", "/nowhere"), "/nowhere: not a run directory"),
    (("export", "unfinished"), "unfinished: no summary.json; the run has not finished"),
    (("export", "/nowhere", "--format", "int3"), "--format int3: unknown"),
    (("plan", "--base", "/nowhere"), "/nowhere: not a directory"),
    (("plan", "--base", "org/model"), "org/model: no directory, not in this machine's cache of the hub, and http"),
    (("simulate", "--set", "model.base=org/model"), "cannot be reached; expected the directory of a model"),
    (("plan", "--data", "none.jsonl"), "none.jsonl: no such file"),
    (("plan", "--job", "typo.toml"), "federation.ruonds: unknown key"),
    (("init", "new", "--model", "/nowhere", "--data", "broken.jsonl"), "/nowhere: not a directory"),
    (("init", "new", "--model", "demo", "--data", "broken.jsonl"), "broken.jsonl:1: is not JSON"),
    (("init", "--model", "demo", "--data", "broken.jsonl"), "job.toml: exists already"),
    (("chat", "/nowhere"), "/nowhere: not an exported directory"),
    (("serve", "/nowhere"), "/nowhere: not an exported directory"),
    (("client", "join", "/nowhere", "--data", "broken.jsonl", "--home", "home"), "/nowhere: cannot read an invitation"),
    (("client", "start", "--home", "none"), "none: there is no device here"),
    (("server", "start", "--home", "none"), "none: there is no server here"),
    (("server", "submit", "typo.toml", "--home", "fleet"), "federation.ruonds: unknown key"),
    (("server", "submit", "--set", "model.base=/nowhere", "--home", "fleet"), "/nowhere: not a directory"),
    (("server", "submit", "--set", "data.evaluation=none.jsonl", "--home", "fleet"), "none.jsonl: cannot be read"),
    (("fleet", "sign", "typo.toml", "--home", "owner"), "federation.ruonds: unknown key"),
    (("fleet", "sign", "none.toml", "--home", "owner"), "none.toml: cannot be read"),
    (("fleet", "sign", "job.toml", "--set", "model.base=/nowhere", "--home", "owner"), "/nowhere: not a directory"),
    (("fleet", "sign", "job.toml", "--home", "none"), "none: there is no fleet here"),
]

FOUND = [
    (("check", "typo.toml"), "federation.ruonds: unknown key"),
    (("check", "none.toml"), "none.toml: cannot be read"),
    (("check", "job.toml", "--set", "data.train=none/*.jsonl"), "no such file"),
    (("check", "job.toml", "--set", "data.train=broken.jsonl"), "broken.jsonl:1: is not JSON"),
    (("check", "job.toml", "--set", "model.base=/nowhere", "--set", "data.train=demo"), "/nowhere: not a directory"),
]


@dataclass(frozen=True)
class Said:
    """The outcome of one command line."""

    status: int
    output: str
    error: str
    imported: list[str]


def start(folder: Path, commands: Sequence[Sequence[str]]) -> list[Said]:
    """Runs command lines in one new process."""
    no_hub = {"HF_ENDPOINT": NO_HUB, "HF_HUB_CACHE": str(folder / "cache"), "no_proxy": "*"}
    environment = os.environ | {"COLUMNS": "300"} | no_hub
    request = json.dumps([commands, HEAVY])
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=folder, env=environment, input=request, stdout=subprocess.PIPE, text=True, check=True
    )
    return [Said(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Said]:
    """Runs each command in a folder with a job that has a typo, data that is broken, and a fleet's server."""
    path = tmp_path_factory.mktemp("startup")
    (path / "typo.toml").write_text("[federation]\nruonds = 3\n")
    (path / "unnamed.toml").write_text('[data]\ntrain = "broken.jsonl"\n')
    (path / "job.toml").write_text('[model]\nbase = "demo"\n[data]\ntrain = "demo"\n')
    (path / "broken.jsonl").write_text("no JSON\n")
    (path / "empty").mkdir()
    (path / "full").mkdir()
    (path / "full" / "something").touch()
    (path / "unfinished").mkdir()
    (path / "unfinished" / "job.toml").touch()
    init = ("server", "init", "--address", "localhost:8443", "--home", "fleet")
    commands = [init, ("fleet", "init", "--home", "owner"), *HELPS, *(words for words, _ in [*MISTAKES, *FOUND])]
    return dict(zip(commands, start(path, commands), strict=True))


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_is_shown_without_heavy_packages(said: dict[tuple[str, ...], Said], words: tuple[str, ...]) -> None:
    found = said[words]
    assert (found.status, found.imported) == (0, [])
    assert "Usage: " in found.output


@pytest.mark.parametrize(("words", "complaint"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_named_without_heavy_packages(
    said: dict[tuple[str, ...], Said], words: tuple[str, ...], complaint: str
) -> None:
    found = said[words]
    assert (found.status, found.imported) == (2, [])
    assert complaint in found.error


def test_a_model_in_the_cache_of_the_hub_needs_no_network(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models--org--model"
    shutil.copytree(BASE_DIRECTORY, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (found,) = start(tmp_path, [("plan", "--base", "org/model", "--no-try", "--json")])
    assert (found.status, found.error) == (0, "")


@pytest.mark.parametrize(("words", "complaint"), FOUND, ids=[" ".join(words) for words, _ in FOUND])
def test_a_check_names_mistakes_without_heavy_packages(
    said: dict[tuple[str, ...], Said], words: tuple[str, ...], complaint: str
) -> None:
    found = said[words]
    assert (found.status, found.imported, found.error) == (1, [], "")
    assert complaint in found.output


@pytest.mark.parametrize(("typed", "offered"), [("si", ["simulate"]), ("server st", ["start", "stop", "status"])])
def test_a_shell_completes_commands(typed: str, offered: list[str]) -> None:
    asked = {"_FEDTUNE_COMPLETE": "complete_bash", "COMP_WORDS": f"fedtune {typed}"}
    environment = os.environ | asked | {"COMP_CWORD": str(len(typed.split()))}
    command = Path(sys.executable).with_name("fedtune")
    done = subprocess.run([command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


def test_a_command_that_computes_imports_torch(tmp_path: Path) -> None:
    (found,) = start(tmp_path, [("plan", "--memory", "1")])
    assert "torch" in found.imported  # otherwise the tests above would prove nothing
