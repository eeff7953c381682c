"""The install script: its refusals, its dry run and, behind the slow marker, an installation from begin to end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from owner import make_server

from fedtune.demo import write_federation
from fedtune.server.live.server_home import INVITATION, ServerConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "install.sh"
INSTALL_SECONDS = 900


class Machine:
    """A scratch home with an invitation and a data file."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.programs = folder / "programs"
        self.home.mkdir()
        self.programs.mkdir()
        server = make_server(folder / "server", ServerConfig("localhost:8443", "127.0.0.1", 8443))
        self.invitation = folder / "invitation.json"
        self.invitation.write_bytes((server.path / INVITATION).read_bytes())
        write_federation(folder / "data", 1, 0, 4, 4)
        self.data = folder / "data" / "clients" / "000.jsonl"

    @property
    def device(self) -> Path:
        return self.home / ".fedtune" / "client"

    @property
    def programs_folder(self) -> Path:
        return self.home / ".local" / "share" / "fedtune"

    def install(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "FEDTUNE_"))}
        return subprocess.run(
            ["sh", SCRIPT, "--user", "--no-service", "--python", sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
            env=kept | {"HOME": str(self.home), "PATH": f"{self.programs}:{os.environ['PATH']}"},
        )


def hash_of_torch(folder: Path) -> str:
    """Returns the hash of the locked version's build that pip finds first, which may be one for the CPU."""
    lock = (ROOT / "deploy" / "locks" / "client.txt").read_text()
    torch = next(line.split()[0] for line in lock.splitlines() if line.startswith("torch=="))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder / 'torch'}", torch]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)
    (wheel,) = (folder / "torch").iterdir()
    return f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_dry_run_says_everything_and_does_nothing(machine: Machine) -> None:
    done = machine.install("--invitation", machine.invitation, "--name", "kitchen", "--data", machine.data, "--dry-run")
    assert done.returncode == 0, done.stderr
    for step in ("-m venv", "fedtune[client] @ file://", "client join", "--name kitchen"):
        assert step in done.stdout
    assert list(machine.home.iterdir()) == []


def test_a_device_without_torch_takes_its_own_lock_and_an_upgrade_keeps_it_so(machine: Machine) -> None:
    arguments = ("--invitation", machine.invitation, "--data", machine.data, "--dry-run")
    done = machine.install(*arguments, "--edge")
    assert done.returncode == 0, done.stderr
    for step in ("no torch", "deploy/locks/edge.txt", "fedtune[edge] @ file://"):
        assert step in done.stdout
    machine.programs_folder.mkdir(parents=True)
    (machine.programs_folder / "extra").write_text("edge\n")
    assert "fedtune[edge] @ file://" in machine.install(*arguments).stdout


def test_torch_is_for_the_hardware_that_is_there(machine: Machine) -> None:
    arguments = ("--invitation", machine.invitation, "--name", "kitchen", "--data", machine.data, "--dry-run")
    fake = machine.programs / "nvidia-smi"
    fake.write_text("#!/bin/sh\nexit 9\n")  # a driver without a GPU
    fake.chmod(0o755)
    without = machine.install(*arguments, "--torch-index", "https://cpu.example.org").stdout
    assert "torch for cpu" in without
    if os.uname().machine == "x86_64":
        assert "--extra-index-url https://cpu.example.org" in without
    assert "--extra-index-url" not in machine.install(*arguments).stdout, "there is no second index by default"
    fake.write_text("#!/bin/sh\necho 'GPU 0: one of them'\n")
    having = machine.install(*arguments, "--torch-index", "https://cpu.example.org").stdout
    assert "torch for cuda" in having
    assert "--extra-index-url" not in having


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "no device yet; expected --invitation FILE and --data FILE"),
        (("--invitation", "none.json", "--data", "none.jsonl"), "--invitation none.json: cannot be read"),
        (("--invitation", "INVITATION"), "expected --data FILE"),
        (("--invitation", "INVITATION", "--data", "none.jsonl"), "--data none.jsonl: missing or empty"),
        (("--invitation", "INVITATION", "--data", "DATA", "--torch", "tpu"), "--torch tpu: expected cpu or cuda"),
        (("--invitation", "INVITATION", "--data", "DATA", "--edge", "--torch", "cpu"), "with --edge has no torch"),
        (("--invitation", "INVITATION", "--data", "DATA", "--source", "none"), "--source none: no such file"),
        (("--invitation", "INVITATION", "--data", "DATA", "--python", "false"), "not a Python 3.11 or newer"),
        (("--invitation", "INVITATION", "--data", "DATA", "--lock", "none"), "--lock none: cannot be read"),
        (("--invitation", "INVITATION", "--data", "DATA", "--torch-hash", "0f"), "0f: expected sha256:HEX"),
        (
            ("--invitation", "INVITATION", "--data", "DATA", "--source-hash", "sha256:0f"),
            "--source-hash is for a wheel",
        ),
        (
            ("--invitation", "INVITATION", "--data", "DATA", "--source", "DATA", "--source-hash", "sha256:0f"),
            "has another hash",
        ),
        (("--invitation",), "--invitation: expected a value"),
        (("--colour", "red"), "--colour: unknown option"),
    ],
)
def test_mistakes_are_told_before_anything_is_changed(
    machine: Machine, arguments: tuple[str, ...], complaint: str
) -> None:
    given = {"INVITATION": str(machine.invitation), "DATA": str(machine.data)}
    done = machine.install(*(given.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert list(machine.home.iterdir()) == []


def test_uninstalling_what_is_not_there_is_no_mistake(machine: Machine) -> None:
    done = machine.install("--uninstall")
    assert done.returncode == 0, done.stderr
    assert list(machine.home.iterdir()) == []


@pytest.mark.slow
def test_a_device_is_installed_upgraded_and_removed_and_its_data_stays(machine: Machine, tmp_path: Path) -> None:
    arguments = ("--torch", "cpu", "--torch-hash", hash_of_torch(tmp_path))
    done = machine.install("--invitation", machine.invitation, "--name", "kitchen", "--data", machine.data, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((machine.device / "device.json").read_text())["name"] == "kitchen"
    key = (machine.device / "node.key").read_bytes()
    fedtune = machine.programs_folder / "bin" / "fedtune"
    status = subprocess.run(
        [fedtune, "client", "status", "--home", machine.device], capture_output=True, text=True, check=False
    )
    assert "device kitchen of localhost:8443: stopped" in status.stdout
    assert (machine.programs_folder / "share" / "fedtune" / "systemd" / "fedtune-client.service").is_file()

    again = machine.install(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "client join" not in again.stdout
    assert (machine.device / "node.key").read_bytes() == key

    gone = machine.install("--uninstall")
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert not machine.device.exists()
    assert not machine.programs_folder.exists()
    assert machine.data.exists()
