"""An environment with the inference extra alone has no torch, and serves."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from fedtune.server.display import Silent
from fedtune.server.export.run import export_run

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_an_environment_without_torch_serves_and_chats(make_run: Callable[..., Path], tmp_path: Path) -> None:
    model = export_run(make_run(), ["fp32"], tmp_path / "onnx", Silent())[0].path
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)

    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    done = run(str(binaries / "python"), "-m", "pip", "install", "--quiet", *constraints, f"{ROOT}[inference]")
    assert done.returncode == 0, done.stderr
    assert run(str(binaries / "python"), "-c", "import torch").returncode == 1
    # The model has no chat template: chat says so, which only a loaded model can.
    chatted = subprocess.run(
        [binaries / "fedtune", "chat", str(model)],
        input="turn on the lamp\n",
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert "has no chat template" in chatted.stdout
    assert chatted.returncode == 0

    command = [str(binaries / "fedtune"), "serve", str(model), "--port", "0"]
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

    refused = run(str(binaries / "fedtune"), "export", str(model))
    assert refused.returncode == 2
    assert "pip install 'fedtune[export]'" in refused.stderr
