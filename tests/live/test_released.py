"""From an export to a device by the commands of owner, server and device."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from endpoint import Endpoint, listening
from owner import approve, invitation, make_server, owner_of

from fedtune.client.live.device_home import ClientHome
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.core.protocol.model_manifest import MANIFEST, Manifest, list_files
from fedtune.server import cli
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.server_home import ServerConfig, ServerHome

Command = Callable[..., str]
BASE = Base("demo", "0" * 64, "nf4", 40, 32.0, ("all-linear",), 256, "core", "1" * 64)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    yield from listening(tmp_path)


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """Makes a server's folder, beside its owner's."""
    return make_server(tmp_path / "server", ServerConfig("localhost:8443", "127.0.0.1", 0))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Gives run("client", "pull", ...), which returns what a command says; only the device's folder is the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.delenv("FEDTUNE_SERVER_HOME", raising=False)
    monkeypatch.delenv("FEDTUNE_FLEET_HOME", raising=False)
    monkeypatch.setenv("FEDTUNE_CLIENT_HOME", "device")

    def command(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["fedtune", *arguments])
        ended: int | str | None = 0
        try:
            cli.main()
        except SystemExit as end:
            ended = end.code
        said = capsys.readouterr()
        assert (ended or 0) == status, said.err
        return said.err if status else said.out

    return command


def export(folder: Path, job: str, form: str, kind: str = "model", content: bytes = b"weights") -> Path:
    """Writes an exported directory, which is not a model but is released like one."""
    directory = folder / "runs" / job / "onnx" / form
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(content)
    (directory / MANIFEST).write_text(json.dumps(Manifest(kind, job, form, {}, list_files(directory)).to_json()))
    return directory


def finished(home: ServerHome, job: str, number: int) -> None:
    folder = home.path / "jobs" / "finished"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:06d}-{job}.toml").touch()


def device_of(endpoint: Endpoint, tmp_path: Path) -> ClientHome:
    """Returns a device that has joined and was approved, and knows where the endpoint listens."""
    (tmp_path / "data.jsonl").write_text('{"text": "one example"}\n')
    made = ClientHome.join(tmp_path / "device", invitation(endpoint.home), "kitchen", tmp_path / "data.jsonl")
    assert made.request is not None
    approve(endpoint.home, made.request)
    device = tmp_path / "device" / "device.json"
    device.write_text(device.read_text().replace("localhost:8443", endpoint.public))
    return made


def test_a_model_reaches_a_device_once_its_owner_has_released_it(
    endpoint: Endpoint, run: Command, tmp_path: Path
) -> None:
    device, owner, server = device_of(endpoint, tmp_path), str(tmp_path / "owner"), str(endpoint.home.path)
    for number, job in enumerate(("first", "second"), 1):
        export(endpoint.home.path, job, "int4", content=job.encode())
        export(endpoint.home.path, job, "fp32", content=job.encode())
        finished(endpoint.home, job, number)
    assert "finished jobs: no model is released; jobs with one: none yet" in run("client", "pull", status=2)

    # The owner's machine holds a copy of what the server exported, and has no server.
    said = run("fleet", "publish", str(endpoint.home.path / "runs" / "first" / "onnx"), "--home", owner)
    assert "release 1: first, fp32, int4, valid for 90 days; carry first.release to the server" in said
    assert run("server", "offer", "first.release", "--home", server) == "release 1: first, fp32, int4\n"
    pulled = json.loads(run("client", "pull", "--json"))
    assert (pulled["release"], pulled["version"][:11]) == (1, "first-int4-")

    # Both folders on one machine: the release reaches the server at once, and the command says what that means.
    both = ("--home", owner, "--server-home", server)
    said = run("fleet", "publish", str(endpoint.home.path / "runs" / "second" / "onnx" / "fp32"), *both)
    assert "release 2: second, fp32" in said
    assert "this machine holds the fleet's key beside the server" in said
    assert "second-fp32-" in run("client", "pull")
    assert "and this device has installed release 2, second" in run("client", "pull", "first", status=1)
    assert "first-int4-" in run("client", "rollback")  # the device's own owner may
    assert "release 3: first" in run("fleet", "publish", str(endpoint.home.path / "runs" / "first" / "onnx"), *both)
    assert "first-int4-" in run("client", "pull")
    assert device.models.release is not None
    assert device.models.release.number == 3


def test_an_owner_and_a_server_are_told_what_devices_would_refuse(
    home: ServerHome, run: Command, tmp_path: Path
) -> None:
    owner, server = str(tmp_path / "owner"), str(home.path)
    exported = export(home.path, "first", "int4")
    publish = ("fleet", "publish", str(exported), "--home", owner)
    both = (*publish, "--server-home", server)
    assert "first: no finished job has this name" in run(*both, status=2)
    finished(home, "first", 1)
    adapters = export(home.path, "base", "int4", kind="adapter-base")
    said = run("fleet", "publish", str(adapters), "--home", owner, status=2)
    assert "an export of kind adapter-base; devices can install a model or an edge pack" in said
    assert "not an exported directory" in run("fleet", "publish", str(tmp_path), "--home", owner, status=2)

    run(*publish, "--out", "old.release")
    assert "release 2" in run(*both)  # what was refused above has used up no number
    assert "release 1 does not come after 2" in run("server", "offer", "old.release", "--home", server, status=2)
    owner_of(home).rotate()  # the server has not got the new log yet
    run(*publish, "--out", "rotated.release")
    said = run("server", "offer", "rotated.release", "--home", server, status=2)
    assert "not signed with this fleet's key" in said

    (exported / "model.onnx").write_bytes(b"changed")
    assert "was changed after the export" in run(*publish, status=2)


def test_a_job_that_the_owner_waits_for_is_released_where_the_key_is_on_the_server_s_machine(
    home: ServerHome, run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_FLEET_HOME", str(tmp_path / "owner"))
    jobs = Jobs(home)
    for number, name in enumerate(("first", "second"), 1):
        terms = JobTerms(load_job(None, ["training.learning_rate=0.03", f"federation.run={number}"]), BASE)
        signed = JobManifest.sign(owner_of(home).key, name, terms, time.time() + 60)
        (tmp_path / f"{name}.manifest").write_bytes(signed.data)

    def work() -> None:
        """Does what a server does: takes the job, writes its export, and finishes it."""
        while not jobs.waiting():
            time.sleep(0.05)
        (job,) = jobs.waiting()
        export(home.path, job.name, "int4")
        jobs.finish(job)

    server = threading.Thread(target=work)
    server.start()
    folder = ("--home", str(home.path))
    said = run("server", "submit", "--manifest", "first.manifest", "--wait", *folder)
    server.join()
    assert "release 1: first, int4, signed here: this machine plays the\nfleet's owner too" in said
    assert (home.path / "runs" / "first" / "onnx" / "release.json").is_file()
    said = run("server", "submit", "--manifest", "second.manifest", *folder)
    assert f"fedtune fleet publish {home.path / 'runs' / 'second' / 'onnx'}" in said
    assert "the server is not running; start it with: fedtune server start" in said
    assert "plays the fleet's owner too" not in said  # the owner has signed it before

    said = run("server", "submit", "--set", "federation.run=3", "--name", "third", *folder)
    assert "signed here: this machine plays the fleet's owner too" in said
    assert "federation.clients_per_round is 10, and the fleet has 0 devices now: all that are there" in said
    release = f"fedtune fleet publish {home.path / 'runs' / 'third' / 'onnx'} --server-home {home.path}"
    assert said.endswith(f"once it is released, as --wait does; when it has finished:\n{release}\n")
    with home.lock:
        said = run("server", "submit", "--set", "federation.run=4", "--name", "fourth", *folder)
    assert "watch it with: fedtune server show " in said
