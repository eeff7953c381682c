"""A live federation of devices with torch and devices that cannot import it, on the loopback interface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_helpers import Fleet, MakeFleet
from owner import approve
from without_torch import environment_without_torch

from fedtune.client.live.device_home import ClientHome
from fedtune.core.job.settings import DEMO, ModelSettings
from fedtune.edge.pack_writer import write_pack


@pytest.mark.slow
def test_two_devices_with_torch_and_two_without_give_one_adapter_under_secure_aggregation(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    write_pack(ModelSettings(DEMO), tmp_path / "pack")
    environment = environment_without_torch(tmp_path)
    fleet = make_fleet(4)
    with_torch, without = fleet.names[:2], fleet.names[2:]
    fleet.join(*with_torch)
    for name in without:
        join_without_torch(fleet, name, tmp_path / "pack", environment)
    run = fleet.submit("federation.clients_per_round=1.0")
    fleet.start_server()
    for name in with_torch:
        fleet.start_device(name)
    for name in without:
        fleet.start_device(name, environment=environment)
    rounds = fleet.finished(run, seconds=300)
    assert [line["survivors"] for line in rounds] == [fleet.names, fleet.names]
    assert [line["secure"]["summed"] for line in rounds] == [4, 4]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    for name in fleet.names:
        trainer, weights = ("torch", "dequantized") if name in with_torch else ("onnxruntime", "mapped")
        assert fleet.device_status(name)["plan"]["plan"]["trainer"] == trainer
        assert fleet.status()["devices"][name]["plan"]["weights"] == weights
        assert f"trainer: {trainer}" in said_by_status(fleet, name)
        loaded = Path(f"/proc/{fleet.devices[name].pid}/maps").read_text(encoding="utf-8")
        assert ("libtorch" in loaded) == (name in with_torch)


def join_without_torch(fleet: Fleet, name: str, pack: Path, environment: dict[str, str]) -> None:
    """Makes a device with `fedtune client join`, which checks its plan by a real step, and has the owner approve it."""
    home, data = fleet.client_home(name), fleet.folder / "data" / "clients" / f"{name}.jsonl"
    arguments = ["client", "join", fleet.home.path / "invitation.json", "--name", name, "--data", data]
    command = [
        sys.executable,
        "-m",
        "fedtune.server.cli",
        *map(str, arguments),
        "--base",
        str(pack),
        "--home",
        str(home),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "trainer: onnxruntime" in done.stdout
    request = ClientHome(home).request
    assert request is not None
    approve(fleet.home, request)


def said_by_status(fleet: Fleet, name: str) -> str:
    command = [sys.executable, "-m", "fedtune.server.cli", "client", "status", "--home", str(fleet.client_home(name))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
