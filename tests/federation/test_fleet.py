"""A simulated fleet from the command's own entry point: stragglers cost virtual time, and runs repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import JobError
from fedtune.core.job import load_job
from fedtune.demo import JOB
from fedtune.server.display import Silent
from fedtune.server.simulation.simulate import simulate

FLEET = """
[[kind]]
name = "quick"
count = 5
memory_mb = 4000
tokens_per_second = 1000
uplink_kbit = 10000
downlink_kbit = 10000
failure_rate = 0.3

[[kind]]
name = "slow"
count = 1
memory_mb = 4000
tokens_per_second = 250
uplink_kbit = 10000
downlink_kbit = 10000
"""
SMALL = [
    "secure_aggregation.enabled=false",
    "export.formats=[]",
    "data.clients=6",
    "data.examples_per_client=20",
    "data.evaluation=''",
    "training.local_steps=4",
    "federation.rounds=3",
    "federation.clients_per_round=4",
    "federation.selection=deadline",
]


def run(folder: Path, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    (folder / "fleet.toml").write_text(FLEET)
    job = load_job(JOB, [*SMALL, f"simulation.fleet={folder / 'fleet.toml'}"])
    summary = simulate(job, folder / name, Silent())
    files = (folder / name / file for file in ("rounds.jsonl", "virtual.jsonl"))
    rounds, virtual = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return rounds, virtual, summary["adapter_digest"]


def test_only_what_is_in_time_counts_and_a_run_repeats(tmp_path: Path) -> None:
    rounds, virtual, digest = run(tmp_path, "first")
    again = run(tmp_path, "again")
    assert (virtual, digest) == again[1:]
    for real, clock in zip(rounds, virtual, strict=True):
        assert real["round"] == clock["round"]
        assert sorted(real["survivors"]) == sorted(part["id"] for part in clock["clients"] if part["counts"])
        assert clock["seconds"] <= clock["deadline"]
    parts = [part for clock in virtual for part in clock["clients"]]
    slow = [part for part in parts if part["kind"] == "slow"]
    assert slow
    assert all(part["share"] < 1 for part in slow)
    assert all(part["share"] == 1 for part in parts if part["kind"] == "quick")
    assert any(part["seconds"] is None for part in parts)
    dropped = [client["dropped"] for real in rounds for client in real["clients"] if client["dropped"]]
    assert any("vanished" in reason for reason in dropped)


def test_a_mistake_in_the_fleet_file_is_told_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.replace("count = 5", "count = 0"))
    job = load_job(JOB, [*SMALL, f"simulation.fleet={path}"])
    with pytest.raises(JobError, match=r"kind 1 \(quick\): count: expected greater than or equal to 1, got 0"):
        simulate(job, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()
