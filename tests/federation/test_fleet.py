"""A simulated fleet from the command's own entry point: stragglers cost virtual time, and runs are reproducible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from federation_helpers import go_on
from federation_helpers import run as simulate

from fedtune.core.errors import JobError
from fedtune.core.job.job_file import load_job
from fedtune.demo import JOB

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
    summary = simulate(job, folder / name)
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
        simulate(job, tmp_path / "run")
    assert not (tmp_path / "run").exists()


TIERED = """
[[kind]]
name = "wired"
count = 6
memory_mb = 4000
tokens_per_second = 2000
uplink_kbit = 10000
downlink_kbit = 10000

[[kind]]
name = "radio"
count = 4
memory_mb = 4000
tokens_per_second = 2000
uplink_kbit = 120
downlink_kbit = 10000
charging = 0.6
"""


def fleet_run(folder: Path, name: str, fleet: str, *overrides: str) -> tuple[list[Any], list[Any], dict[str, Any]]:
    (folder / "fleet.toml").write_text(fleet)
    quick = ("data.holdout=0", "federation.rounds=2", "training.local_steps=2")
    job = load_job(JOB, [*SMALL, *quick, f"simulation.fleet={folder / 'fleet.toml'}", *overrides])
    summary = simulate(job, folder / name)
    files = (folder / name / file for file in ("rounds.jsonl", "virtual.jsonl"))
    rounds, virtual = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return rounds, virtual, summary


@pytest.mark.parametrize("secure", ["true", "false"])
def test_kinds_train_the_rank_of_their_plan_under_secure_aggregation_too(tmp_path: Path, secure: str) -> None:
    chosen = (
        "adapter.kind=lora",
        "data.clients=10",
        "federation.clients_per_round=10",
        f"secure_aggregation.enabled={secure}",
    )
    rounds, virtual, _ = fleet_run(tmp_path, "run", TIERED, *chosen)
    kinds = {part["id"]: part["kind"] for clock in virtual for part in clock["clients"]}
    assert any(line["aborted"] is None for line in rounds)
    for line in rounds:
        for client in line["clients"]:
            assert client["tier"] == (16 if kinds[client["id"]] == "wired" else 4)
        if line["aborted"] is None and secure == "true":
            assert line["secure"]["summed"] == len(line["survivors"])
    trained = {client["rank"] for line in rounds for client in line["clients"]}
    assert trained >= ({16} if secure == "true" else {4, 16})
    assert sum(clock["ineligible"].get("not charging", 0) for clock in virtual) > 0


def test_a_secure_round_of_a_fleet_loses_the_late_and_the_vanished_and_has_its_sum(tmp_path: Path) -> None:
    chosen = ("data.clients=10", "federation.clients_per_round=8", "secure_aggregation.enabled=true")
    rounds, virtual, _ = fleet_run(tmp_path, "run", FLEET.replace("0.3", "0.1"), *chosen)
    assert any(line["secure"] for line in rounds)
    for line, clock in zip(rounds, virtual, strict=True):
        if line["secure"]:
            assert sorted(line["survivors"]) == sorted(part["id"] for part in clock["clients"] if part["counts"])
            assert line["secure"]["summed"] < len(line["cohort"])


def test_choosing_by_utility_is_a_key_of_the_job_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    chosen = ("data.clients=12", "federation.clients_per_round=3", "federation.selection=utility")
    whole, _, summary = fleet_run(tmp_path, "whole", FLEET, *chosen)
    fleet_run(tmp_path, "part", FLEET, *chosen)
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "000002")
    (tmp_path / "part" / "summary.json").unlink()
    again = go_on(tmp_path / "part")
    assert again["adapter_digest"] == summary["adapter_digest"]
    lines = [json.loads(line) for line in (tmp_path / "part" / "rounds.jsonl").read_text().splitlines()]
    assert [line["cohort"] for line in lines] == [line["cohort"] for line in whole]


def test_a_late_update_is_dropped_or_taken_by_the_next_round_at_less_weight(tmp_path: Path) -> None:
    chosen = ("data.clients=12", "federation.clients_per_round=3", "compression.preset=none")
    dropped, _, first = fleet_run(tmp_path, "dropped", FLEET, *chosen)
    taken, virtual, second = fleet_run(tmp_path, "taken", FLEET, *chosen, "federation.late=next")
    assert not any(line["notes"] for line in dropped)
    late = [part["id"] for part in virtual[0]["clients"] if not part["counts"] and part["seconds"] is not None]
    expected = [f"the late update of {name} was taken at 0.71 of its weight" for name in sorted(late)]
    present = set(taken[1]["survivors"])
    assert taken[1]["notes"] == [note for name, note in zip(sorted(late), expected, strict=True) if name not in present]
    assert taken[1]["notes"]
    assert first["adapter_digest"] != second["adapter_digest"]
    lost = {client["id"]: client for client in taken[0]["clients"] if client["dropped"]}
    assert all(lost[name]["bytes_up"] > 0 for name in late)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["simulation.fleet="], "simulation.fleet names no fleet"),
        (["secure_aggregation.enabled=true"], "cannot make one update weigh less"),
        (["federation.aggregation=alternating"], "the next round trains another factor"),
        (["federation.aggregation=flora", "compression.preset=none"], "the next round has another basis"),
    ],
)
def test_late_updates_that_cannot_be_used_are_refused_when_the_job_is_read(
    overrides: list[str], complaint: str
) -> None:
    with pytest.raises(JobError, match=complaint):
        load_job(JOB, [*SMALL, "simulation.fleet=bundled", "federation.late=next", *overrides])
