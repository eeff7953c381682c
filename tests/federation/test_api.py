"""The Python API: data in memory, a call after every round, rounds as a DataFrame, a run like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import pytest
from federation_helpers import without_pictures

from fedtune.api import InputError, Job, RoundRecord, Run, RunError, load_job, load_run, resume, simulate
from fedtune.demo import make_evaluation, make_households

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


EVALUATION = [{"prompt": row["prompt"], "completion": row["completion"]} for row in make_evaluation()[:10]]


@pytest.fixture
def job() -> Iterator[Job]:
    with without_pictures():
        yield load_job(None, **SECTIONS)


def test_a_federation_on_rows_in_memory(job: Job, tmp_path: Path) -> None:
    seen: list[RoundRecord] = []
    clients = {"frame": pandas.DataFrame(ROWS["home-0"]), "list": ROWS["home-1"], "lazy": iter(ROWS["home-2"])}
    run = simulate(job, tmp_path / "run", clients=clients, evaluation=EVALUATION, on_round=seen.append)
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
    rest: list[RoundRecord] = []
    resume(run, on_round=rest.append)
    assert [record.round for record in rest] == [2]
    assert len(run.rounds()) == 2
    assert (
        Run(run.path).summary["adapter_digest"]
        == simulate(job, tmp_path / "other", clients=ROWS).summary["adapter_digest"]
    )


def test_metrics_of_the_users_own_are_beside_loss_and_exact_match_and_change_no_bit(job: Job, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []

    def characters(prompt: str, expected: str, answer: str) -> int:
        asked.append((prompt, expected, answer))
        return len(answer)

    seen: list[RoundRecord] = []
    job = replace(job, evaluation=replace(job.evaluation, answer_tokens=4))
    run = simulate(
        job,
        tmp_path / "run",
        clients=ROWS,
        evaluation=EVALUATION,
        metrics={"characters": characters, "same": lambda prompt, expected, answer: expected == answer},
        on_round=seen.append,
    )
    assert sorted(asked[1:11]) == sorted(set(asked[1:11]))
    assert {(prompt, expected) for prompt, expected, _ in asked} == {
        (row["prompt"], row["completion"]) for row in EVALUATION
    }
    trial, rest = asked[0], asked[1:]
    assert trial[1] == trial[2]
    assert len(rest) == 30  # before training and after each of two rounds
    means = [sum(len(answer) for _, _, answer in rest[first : first + 10]) / 10 for first in (0, 10, 20)]
    assert [record.eval and record.eval.custom["characters"] for record in seen] == means[1:]
    frame = run.rounds()
    assert list(frame["characters"]) == means[1:]
    assert list(frame.columns[-2:]) == ["characters", "same"]
    assert frame["same"].between(0, 1).all()
    assert run.summary["eval_before"]["custom"]["characters"] == means[0]
    assert run.summary["eval_after"]["custom"]["characters"] == means[2]
    assert f"{means[2]:.4g}" in run.report.read_text()
    plain = simulate(job, tmp_path / "plain", clients=ROWS, evaluation=EVALUATION)
    assert plain.summary["adapter_digest"] == run.summary["adapter_digest"]
    assert plain.summary["eval_after"]["loss"] == run.summary["eval_after"]["loss"]
    assert "characters" not in plain.rounds()


def test_a_metric_that_fails_ends_the_run_with_the_example_and_the_run_goes_on_with_another(
    job: Job, tmp_path: Path
) -> None:
    scored: list[str] = []

    def fails_later(prompt: str, expected: str, answer: str) -> float:
        scored.append(prompt)
        if len(scored) == 15:  # one trial, ten before training, the fourth of the first round
            raise ZeroDivisionError("of no use")
        return 1.0

    job = replace(job, evaluation=replace(job.evaluation, answer_tokens=4))
    with pytest.raises(RunError, match="metric mine fails: ZeroDivisionError: of no use; on prompt '") as caught:
        simulate(job, tmp_path / "run", clients=ROWS, evaluation=EVALUATION, metrics={"mine": fails_later})
    assert repr(scored[-1]) in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    run = load_run(tmp_path / "run")
    resume(run, metrics={"mine": lambda prompt, expected, answer: 0.5})
    assert list(run.rounds()["mine"]) == [0.5, 0.5]
    assert run.summary["eval_before"]["custom"] == {"mine": 1.0}


def test_a_metric_that_cannot_be_used_is_refused_before_a_run_begins(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="custom metrics compare answers to the server's held-out examples, but there"):
        simulate(job, out, clients=ROWS, metrics={"mine": lambda prompt, expected, answer: 1.0})
    with pytest.raises(InputError, match=r"metric mine fails: ValueError: .*; on prompt '.*', expected '.*', answer '"):
        simulate(
            job,
            out,
            clients=ROWS,
            evaluation=EVALUATION,
            metrics={"mine": lambda prompt, expected, answer: int("no")},
            force=True,
        )
    assert not out.exists()


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
