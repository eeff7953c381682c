"""The full loop: a device's data trains the model, which comes back to the device and answers there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_helpers import MakeFleet, Process, eventually
from owner import owner_of


def fedtune(*arguments: str) -> str:
    command = [sys.executable, "-m", "fedtune.server.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_device_answers_with_the_model_that_its_fleet_trained(make_fleet: MakeFleet, tmp_path: Path) -> None:
    fleet = make_fleet(3)
    fleet.join()
    fleet.start_server()
    fleet.start_devices()
    held_out = f'data.evaluation="{fleet.folder / "data" / "eval.jsonl"}"'
    run = fleet.submit('export.formats=["fp32"]', "federation.rounds=1", held_out, name="first")
    fleet.finished(run)  # with the job's export
    owner = ["--home", str(owner_of(fleet.home).path), "--server-home", str(fleet.home.path)]
    assert "release 1: first, fp32" in fedtune("fleet", "publish", str(run / "onnx"), *owner)

    name = fleet.names[0]
    home = ["--home", str(fleet.client_home(name))]
    pulled = json.loads(fedtune("client", "pull", "--json", *home))  # while the device's process runs
    assert pulled["version"].startswith("first-fp32-")
    manifest = json.loads((Path(pulled["path"]) / "fedtune.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert manifest["provenance"]["adapter_digest"] == summary["adapter_digest"]
    assert "first-fp32" in fedtune("client", "status", *home)

    serving = Process("serve", pulled["path"], "--port", "0", log=tmp_path / "serve.log")
    try:
        url = eventually(lambda: serving.text.rpartition(" on ")[2].strip(), 60, lambda: "it did not serve")
        shown = summary["answers"][0]
        body = {"model": "first", "prompt": shown["prompt"], "temperature": 0, "max_tokens": 40}
        answer = httpx.post(f"{url}/completions", json=body, timeout=30).json()
        # The same words as the server's torch model answered after training.
        assert answer["choices"][0]["text"].split() == shown["after"].split()
    finally:
        serving.stop()
    assert {process.running for process in fleet.devices.values()} == {True}
