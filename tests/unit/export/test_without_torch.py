"""An environment with only the inference extra has no torch, and can pull, serve and chat."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from endpoint import Endpoint, listening
from export_helpers import export_run
from owner import approve, owner_of

from fedtune.client.live.device_home import ClientHome
from fedtune.server.fleet.releasing import release_model
from fedtune.server.live.model_registry import ModelRegistry
from fedtune.server.live.server_home import INVITATION

ROOT = Path(__file__).parents[3]


@pytest.fixture
def offering(make_run: Callable[..., Path], tmp_path: Path) -> Iterator[Endpoint]:
    """Runs a listening server with one finished and exported job."""
    listener = listening(tmp_path)
    endpoint = next(listener)
    export_run(make_run(), ["fp32"], endpoint.home.path / "runs" / "first" / "onnx")
    (endpoint.home.path / "jobs" / "finished").mkdir(parents=True, exist_ok=True)
    (endpoint.home.path / "jobs" / "finished" / "000001-first.toml").touch()
    released = release_model(owner_of(endpoint.home), endpoint.home.path / "runs" / "first" / "onnx", "first")
    ModelRegistry(endpoint.home).take(released.data)
    yield endpoint
    next(listener, None)


@pytest.mark.slow
def test_an_environment_without_torch_pulls_serves_and_chats(offering: Endpoint, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["FEDTUNE_CLIENT_HOME"] = str(tmp_path / "device")

    def run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=600, input=text
        )

    def fedtune(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return run(str(binaries / "fedtune"), *arguments, text=text)

    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    done = run(str(binaries / "python"), "-m", "pip", "install", "--quiet", *constraints, f"{ROOT}[inference]")
    assert done.returncode == 0, done.stderr
    assert run(str(binaries / "python"), "-c", "import torch").returncode == 1

    refused = fedtune("chat")
    assert (refused.returncode, "first: fedtune client pull" in refused.stderr) == (2, True)
    (tmp_path / "mine.jsonl").write_text('{"text": "turn on the lamp"}\n')
    invited = str(offering.home.path / INVITATION)
    done = fedtune("client", "join", invited, "--name", "kitchen", "--data", str(tmp_path / "mine.jsonl"))
    assert done.returncode == 0, done.stderr
    request = ClientHome(tmp_path / "device").request
    assert request is not None
    approve(offering.home, request)
    address = tmp_path / "device" / "device.json"  # the invitation's port is fixed, but this listener uses a free one
    address.write_text(address.read_text().replace("localhost:8443", offering.public))
    done = fedtune("client", "pull")
    assert done.returncode == 0, done.stderr
    assert "first-fp32-" in done.stdout
    # The model has no chat template; chat says so, which proves that it has loaded the model.
    chatted = fedtune("chat", text="turn on the lamp\n")
    assert "has no chat template" in chatted.stdout
    assert chatted.returncode == 0

    command = [str(binaries / "fedtune"), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[-1]
            body = {"model": "run-0", "prompt": "turn on the lamp", "max_tokens": 5, "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=body, timeout=30).json()
            assert answer["usage"]["completion_tokens"] == 5
        finally:
            server.terminate()
    assert server.returncode in (0, -15)

    (tmp_path / "job.toml").write_text('model.base = "demo"\ndata.train = "demo"\n')
    for arguments, extra in (
        (["export", str(tmp_path)], "export"),
        (["client", "start"], "client"),
        (["plan"], "server"),
        (["simulate", "--set", "export.formats=[]", "--out", str(tmp_path / "run")], "server"),
        (["resume", str(tmp_path)], "server"),
    ):
        refused = fedtune(*arguments)
        assert refused.returncode == 2
        assert f"pip install 'fedtune[{extra}] @ {ROOT.as_uri()}'" in refused.stderr
