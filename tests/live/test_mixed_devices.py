"""A live federation of devices with torch and devices that cannot import it, on the loopback interface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_helpers import Fleet, MakeFleet
from owner import approve, owner_of
from without_torch import environment_without_torch

from fedtune.client.live.device_home import ClientHome
from fedtune.core.job.settings import DEMO, ModelSettings
from fedtune.edge.pack_writer import write_pack
from fedtune.server.fleet.releasing import release_model
from fedtune.server.live.model_registry import ModelRegistry


@pytest.mark.slow
def test_two_devices_with_torch_and_two_without_give_one_adapter_under_secure_aggregation(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    environment = environment_without_torch(tmp_path)
    fleet = make_fleet(4)
    offered = fleet.home.path / "packs" / "demo"
    write_pack(ModelSettings(DEMO), offered / "edge")
    ModelRegistry(fleet.home).take(release_model(owner_of(fleet.home), offered).data)
    with_torch, without = fleet.names[:2], fleet.names[2:]
    fleet.join(*with_torch)
    copied, pulled = without
    assert "trainer: onnxruntime" in join_without_torch(fleet, copied, environment, "--base", str(offered / "edge"))
    assert "client pull NAME --format edge" in join_without_torch(fleet, pulled, environment)
    run = fleet.submit("federation.clients_per_round=1.0")
    fleet.start_server()
    said = on_device(fleet, pulled, environment, "pull", "demo", "--format", "edge")
    assert "release 1 of the fleet's owner" in said
    for name in with_torch:
        fleet.start_device(name)
    for name in without:
        fleet.start_device(name, environment=environment)
    rounds = fleet.finished(run, seconds=300)
    assert [line["survivors"] for line in rounds] == [fleet.names, fleet.names]
    assert [line["secure"]["summed"] for line in rounds] == [4, 4]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    for name in fleet.names:
        trainer, weights = ("torch", "dequantized") if name in with_torch else ("onnxruntime", "unpacked")
        assert fleet.device_status(name)["plan"]["plan"]["trainer"] == trainer
        assert fleet.status()["devices"][name]["plan"]["weights"] == weights
        assert f"trainer: {trainer}" in said_by_status(fleet, name)
        loaded = Path(f"/proc/{fleet.devices[name].pid}/maps").read_text(encoding="utf-8")
        assert ("libtorch" in loaded) == (name in with_torch)


def join_without_torch(fleet: Fleet, name: str, environment: dict[str, str], *more: str) -> str:
    """Makes a device with `fedtune client join`, and has the owner approve it; returns the output."""
    data = fleet.folder / "data" / "clients" / f"{name}.jsonl"
    arguments = ["join", str(fleet.home.path / "invitation.json"), "--name", name, "--data", str(data), *more]
    said = on_device(fleet, name, environment, *arguments)
    request = ClientHome(fleet.client_home(name)).request
    assert request is not None
    approve(fleet.home, request)
    return said


def on_device(fleet: Fleet, name: str, environment: dict[str, str] | None, *arguments: str) -> str:
    command = [sys.executable, "-m", "fedtune.server.cli", "client", *arguments, "--home", str(fleet.client_home(name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def said_by_status(fleet: Fleet, name: str) -> str:
    return on_device(fleet, name, None, "status")
