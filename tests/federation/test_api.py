"""The Python API: data in memory, a call after every round, rounds as a DataFrame, a run like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import pytest
from federation_helpers import without_pictures

from fedtune.api import InputError, Job, RoundRecord, Run, load_job, load_run, simulate
from fedtune.demo import make_evaluation, make_households
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import resume

SECTIONS: dict[str, dict[str, Any]] = {
    "adapter": {"kind": "lora", "rank": 4},
    "data": {"evaluation": "", "holdout": 0.0},
    "federation": {"rounds": 2, "clients_per_round": 2},
    "secure_aggregation": {"enabled": False},
    "training": {"local_steps": 1, "batch_tokens": 256, "learning_rate": 2e-3},
    "simulation": {"workers": 1},
}
ROWS = {
    f"home-{index}": [{"prompt": row["prompt"], "completion": row["completion"]} for row in household.rows]
    for index, household in enumerate(make_households(3, 0, 8))
}


@pytest.fixture
def job() -> Iterator[Job]:
    with without_pictures():
        yield load_job(None, **SECTIONS)


def test_a_federation_on_rows_in_memory(job: Job, tmp_path: Path) -> None:
    seen: list[RoundRecord] = []
    clients = {"frame": pandas.DataFrame(ROWS["home-0"]), "list": ROWS["home-1"], "lazy": iter(ROWS["home-2"])}
    evaluation = [{"prompt": row["prompt"], "completion": row["completion"]} for row in make_evaluation()[:10]]
    run = simulate(job, tmp_path / "run", clients=clients, evaluation=evaluation, on_round=seen.append)
    assert [record.round for record in seen] == [1, 2]
    assert {client.id for record in seen for client in record.clients} <= set(clients)
    frame = run.rounds()
    assert list(frame.index) == [1, 2]
    assert frame["exact_match"].notna().all()
    assert (frame["survivors"] == 2).all()
    assert run.summary["clients"] == 3
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.report.is_file()


def test_a_tracker_has_the_rounds_of_a_run_and_does_not_change_its_adapter(job: Job, tmp_path: Path) -> None:
    plain = simulate(job, tmp_path / "plain", clients=ROWS)
    tracked = simulate(load_job(None, **SECTIONS, tracking={"to": ["tensorboard"]}), tmp_path / "run", clients=ROWS)
    assert tracked.summary["adapter_digest"] == plain.summary["adapter_digest"]
    track = [sys.executable, "-m", "fedtune.server.cli", "track", str(tracked.path)]
    subprocess.run(track, check=True)  # what the run did not wait for on a busy machine; otherwise nothing
    state = json.loads((tracked.path / "tracking" / "tensorboard.json").read_text())
    assert (state["done"], state["ended"]) == (2, True)
    assert list((tracked.path / "tensorboard").glob("events.*"))


def test_rows_and_files_give_the_same_adapter(job: Job, tmp_path: Path) -> None:
    first = simulate(job, tmp_path / "run", clients=ROWS)
    data = {**SECTIONS["data"], "train": f"{tmp_path}/run-data/clients/*.jsonl"}
    again = load_job(None, **{**SECTIONS, "data": data})
    second = simulate(again, tmp_path / "again")
    assert first.summary["adapter_digest"] == second.summary["adapter_digest"]


def test_a_run_that_its_callback_ends_goes_on_where_it_stopped(job: Job, tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(job, tmp_path / "run", clients=ROWS, on_round=stop)
    run = load_run(tmp_path / "run")
    assert len(run.rounds()) == 1
    with without_pictures():
        resume(run.path, Silent())
    assert len(run.rounds()) == 2
    assert (
        Run(run.path).summary["adapter_digest"]
        == simulate(job, tmp_path / "other", clients=ROWS).summary["adapter_digest"]
    )


def test_what_cannot_be_used_is_refused_before_anything_is_trained(job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 2 is str; expected a mapping"):
        simulate(job, tmp_path / "run", clients={"a": [{"text": "x"}, "y"]})  # type: ignore[list-item]
    with pytest.raises(InputError, match="run-data: exists already"):
        simulate(job, tmp_path / "run", clients=ROWS)
    with pytest.raises(InputError, match=r"named '\.\./a'"):
        simulate(job, tmp_path / "run", clients={"../a": ROWS["home-0"]}, force=True)
    with pytest.raises(InputError, match="clients is empty"):
        simulate(job, tmp_path / "run", clients={}, force=True)
    with pytest.raises(InputError, match="row 1 cannot be written as JSON"):
        simulate(job, tmp_path / "run", clients={"a": [{"text": object()}]}, force=True)
    with pytest.raises(InputError, match="not a run directory"):
        load_run(tmp_path)
