"""The example for new users: live processes on loopback, and the same adapter as in simulation.

The whole example takes more than a minute. The fast tests only parse its commands; test_live_federation.py checks with
its own fleet that live processes train the same adapter as the simulation, bit for bit.
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

SCRIPT = Path(__file__).parents[2] / "examples" / "live-loopback" / "run.sh"


COMMAND = re.compile(r"(?:^|; do |\$\()\s*fedtune (.+?)(?: >\S+.*| &.*|; done)?$", re.MULTILINE)


def test_every_command_of_the_live_example_is_one_that_fedtune_has() -> None:
    lines = [shlex.split(line) for line in COMMAND.findall(SCRIPT.read_text())]
    assert [line[:2] for line in lines] == [
        ["server", "init"],
        ["server", "enroll"],
        ["server", "start"],
        ["client", "join"],
        ["client", "start"],
        ["server", "submit"],
        ["server", "status"],
        ["server", "stop"],
        ["simulate", "job.toml"],
    ]
    for line in lines:
        command: Command = typer.main.get_command(app)
        rest = line
        while isinstance(command, Group):
            _, found, rest = command.resolve_command(Context(command), rest)
            assert found is not None, line
            command = found
        command.make_context("fedtune", list(rest))  # raises if an option is unknown or an argument is missing


def test_the_job_of_the_live_example_is_one() -> None:
    assert load_job(SCRIPT.with_name("job.toml")).federation.rounds == 2


@pytest.mark.slow
def test_the_live_example_gives_the_adapter_that_its_simulation_gives(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FEDTUNE_PORT": str(port),
    }
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "example"],
        capture_output=True,
        text=True,
        timeout=290,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout
