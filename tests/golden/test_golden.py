"""Six small jobs with recorded adapters and traffic, which a change of structure must not alter.

A different digest or byte count is a change of behaviour. It is recorded again only in a commit that names the intended
change: `python tests/golden/test_golden.py` writes the present results to recorded.json.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import DeviceParts, run_federation
from numpy_trainer import CORE_LAYOUT, LAYOUT, NumpyTrainer

from fedtune.core.adapter.layout import adapter_digest
from fedtune.core.job.device_kinds import Fleet, Kind
from fedtune.core.job.job_file import load_job
from fedtune.core.ledger import Ledger

FLEET = Fleet(
    (
        Kind("phone", 5, 900.0, 600.0, 2.5, 400.0, availability=0.9, failure_rate=0.05, jitter=0.2),
        Kind("board", 3, 700.0, 300.0, 4.0, 900.0, availability=0.95, jitter=0.1),
        Kind("laptop", 4, 4000.0, 4000.0, 900.0, 9000.0, charging=0.9, jitter=0.1),
    )
)
# A core adapter is so small that only slower links make devices train different ranks.
SLOW_FLEET = Fleet(tuple(replace(kind, uplink_kbit=kind.uplink_kbit / 40) for kind in FLEET.kind))
EVERY_JOB = (
    "adapter.kind=lora",
    "data.holdout=0.0",
    "data.evaluation=",
    "federation.rounds=4",
    "training.learning_rate=0.02",
    "training.local_steps=3",
    "training.seed=11",
)
CLEAR = "secure_aggregation.enabled=false"

# Job -> the number of clients, and the job's overrides.
JOBS: dict[str, tuple[int, tuple[str, ...]]] = {
    "secure default": (8, ("federation.clients_per_round=6", "simulation.dropout=0.15")),
    "sparse in the clear": (
        8,
        (
            CLEAR,
            "compression.form=sparse",
            "federation.clients_per_round=0.75",
            "federation.weight=tokens",
            "simulation.failing=0.2",
        ),
    ),
    "mixed ranks with a fleet": (48, ("federation.clients_per_round=24",)),
    "alternating with robust mean": (
        8,
        (
            CLEAR,
            "federation.aggregation=alternating",
            "federation.robust=trimmed-mean",
            "federation.server_optimizer=momentum",
        ),
    ),
    "core with a fleet": (
        48,
        ("adapter.kind=core", "adapter.rank=16", "federation.clients_per_round=24", "compression.error_feedback=false"),
    ),
    "exact float32": (6, (CLEAR, "compression.preset=none", "federation.weight=uniform", "training.schedule=cosine")),
}
RECORDED = Path(__file__).with_name("recorded.json")


def run(name: str, folder: Path) -> dict[str, Any]:
    """Runs one of the jobs; returns its adapter's SHA-256, and its bytes by direction and purpose."""
    count, overrides = JOBS[name]
    fleet = None if "fleet" not in name else SLOW_FLEET if "core" in name else FLEET
    job = load_job(None, [*EVERY_JOB, *overrides])
    devices = DeviceParts(NumpyTrainer(CORE_LAYOUT if job.adapter.kind == "core" else LAYOUT))
    rounds = run_federation(job, count, folder, fleet=fleet, devices=devices)
    state, records = rounds[-1][0], [record for _, record in rounds]
    assert sum(record.aborted is None for record in records) >= 3, [record.aborted for record in records]
    if fleet:
        ranks = {client.rank for record in records for client in record.clients}
        assert len(ranks) == (2 if "core" in name else 3), f"ranks are not mixed: {ranks}"
    traffic = sum((record.traffic for record in records), Ledger()).to_json()
    moved = {way: {purpose: entry["bytes"] for purpose, entry in traffic[way].items()} for way in ("up", "down")}
    return {"adapter": adapter_digest(state.adapter), "bytes": moved}


@pytest.mark.parametrize("name", JOBS)
def test_a_recorded_job_gives_the_same_adapter_and_moves_the_same_bytes(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path) == json.loads(RECORDED.read_text())[name]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        recorded = {each: run(each, Path(scratch) / each) for each in JOBS}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
