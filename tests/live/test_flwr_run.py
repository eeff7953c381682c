"""Stock Flower runs fedtune's apps: `flwr run` on the example, with Flower's own simulation engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from fedtune.server.run_directory import read_rounds, read_summary

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower-app"
SMALL = (
    "federation.rounds=2 federation.clients_per_round=4 data.clients=4 data.examples_per_client=20 "
    "training.local_steps=2 training.batch_tokens=256 secure_aggregation.enabled=false"
)
SECONDS = 300


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Makes the test's own Flower home; ends the SuperLink that `flwr run` leaves behind."""
    home = str(tmp_path / "flower")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flower = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    yield os.environ | flower | {"FLWR_HOME": home, "PATH": path}
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == home:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue


@pytest.mark.slow
def test_flwr_run_trains_the_example(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "run"
    command = ["flwr", "run", str(EXAMPLE), "local", "--stream", "--federation-config", "num-supernodes=4"]
    settings = ["--run-config", f'set="{SMALL}" out="{out}"']
    subprocess.run([*command, *settings], env=environment, timeout=SECONDS, check=True, cwd=tmp_path)
    assert read_summary(out)["status"] == "finished"
    assert [len(line["survivors"]) for line in read_rounds(out)] == [4, 4]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
