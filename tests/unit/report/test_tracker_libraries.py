"""The trackers' own libraries without a network: what was sent is read back, and a run that goes on is one run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.job.settings import TrackerName
from fedtune.server.tracking.run_trackers import RunTrackers

MakeRun = Callable[..., Path]
KEY = "0123456789abcdef0123456789abcdef01234567"
VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT")
PATIENCE = 120.0  # for a busy machine


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without a login, and no address from outside."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def interrupted(run: Path, name: TrackerName) -> list[str]:
    """Tracks a run that is interrupted after round 1, and then goes on to its end; returns what was said."""
    path, summary = run / "rounds.jsonl", (run / "summary.json").read_text()
    lines = path.read_text().splitlines(keepends=True)
    said: list[str] = []
    path.write_text(lines[0])
    (run / "summary.json").unlink()
    with RunTrackers(run, (name,), said.append, limit=PATIENCE):
        pass
    assert json.loads((run / "tracking" / f"{name}.json").read_text())["done"] == 1
    with RunTrackers(run, (name,), said.append, limit=PATIENCE):
        path.write_text("".join(lines))
        (run / "summary.json").write_text(summary)
    return said


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """A finished run, with the state before its first round."""
    path = make_run("runs/first")
    (path / "checkpoints" / "000003").mkdir(parents=True)
    before = json.loads((path / "summary.json").read_text())["eval_before"]
    (path / "checkpoints" / "000003" / "state.json").write_text(json.dumps({"eval_before": before}))
    return path


def losses(run: Path) -> list[float]:
    """Returns the losses before training and after each round."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [json.loads((run / "summary.json").read_text())["eval_before"]["loss"], *(x["eval"]["loss"] for x in lines)]


def test_tensorboard_reads_settings_rounds_and_summary_of_a_run_that_went_on(run: Path) -> None:
    said = interrupted(run, "tensorboard")
    assert said == [f"tracker tensorboard: tensorboard --logdir {run.parent}"] * 2
    reading: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    points = events.Scalars("eval/loss")
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert [point.value for point in points] == pytest.approx(losses(run))
    assert [point.step for point in events.Scalars("round/bytes_up")] == [1, 2, 3]
    assert [point.value for point in events.Scalars("summary/rounds")] == [3.0]
    assert "_hparams_/session_start_info" in events.summary_metadata
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"federation.rounds" in start


@pytest.mark.slow
def test_mlflow_has_one_run_in_a_database_beside_the_runs(run: Path) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    said = interrupted(run, "mlflow")
    store = f"sqlite:///{run.parent}/mlflow.db"
    assert said == [f"tracker mlflow: mlflow ui --backend-store-uri {store}"] * 2
    assert {path.name for path in run.parent.iterdir()} == {"first", "mlflow.db"}
    script = f"""
import json
from mlflow import MlflowClient
client = MlflowClient(tracking_uri={store!r})
experiment = client.get_experiment_by_name("fedtune")
(run,) = client.search_runs([experiment.experiment_id])
points = client.get_metric_history(run.info.run_id, "eval/loss")
print(json.dumps([run.info.run_name, run.info.status, run.data.params, run.data.metrics,
                  [[point.step, point.value] for point in points], run.data.tags]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    name, status, settings, figures, points, tags = json.loads(done.stdout.splitlines()[-1])
    assert (name, status) == ("first", "FINISHED")
    assert settings["federation.rounds"] == "20"
    assert points == [list(pair) for pair in enumerate(losses(run))]
    assert figures["summary/rounds"] == 3
    assert set(tags) == {"mlflow.runName"}, "nothing of the machine or its user"
    assert mlflow is not None


@pytest.mark.slow
def test_mlflow_that_hangs_costs_the_run_a_limited_time_and_gives_away_no_password(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    said: list[str] = []
    with silent_server() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:word-of-ann@127.0.0.1:{port}")
        with RunTrackers(run, ("mlflow",), said.append, limit=3.0) as trackers:
            trackers.after_round()
            began = time.monotonic()
    assert time.monotonic() - began < 10.0
    assert len(said) == 1
    assert said[0].startswith("tracker mlflow: it did not end within 3 s")
    written = [file.read_text(errors="replace") for file in run.rglob("*") if file.is_file()]
    assert "word-of-ann" not in "".join([*said, *written])


@pytest.mark.slow
def test_mlflow_that_is_down_is_said_without_its_password(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with silent_server() as port:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:word-of-ann@127.0.0.1:{port}")
    said: list[str] = []
    with RunTrackers(run, ("mlflow",), said.append, limit=PATIENCE):
        pass
    assert said[0].startswith("tracker mlflow fails, the run itself does not: MlflowException: ")
    assert said[1].endswith(f"To send them: fedtune track {run}")
    assert "word-of-ann" not in "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("login", [False, True])
def test_wandb_writes_one_offline_run_without_anything_of_the_machine(
    run: Path, login: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    if login:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "offline")
    said = interrupted(run, "wandb")
    number = json.loads((run / "tracking" / "wandb.json").read_text())["run"]
    assert said == [f"tracker wandb: offline; to send it: wandb sync {run}/wandb/*-{number}"] * 2
    files = sorted((run / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2, "each process writes a part of the same run"
    records = [record for file in files for record in wandb_records(file)]
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    found = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in h.item} for h in history]
    assert [(step["_step"], step["eval/loss"]) for step in found] == list(enumerate(losses(run)))
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {one.run_id for one in runs} == {number}
    assert {one.display_name for one in runs} == {"first"}
    assert not any(one.host or one.git.remote_url for one in runs)
    text = "".join(str(record) for record in records)
    assert "federation.rounds" in text
    assert "summary/rounds" in text
    everything = b"".join(file.read_bytes() for file in run.rglob("*") if file.is_file())
    assert KEY.encode() not in everything
    assert not list((run / "wandb").rglob("requirements.txt"))


def wandb_records(path: Path) -> Iterator[Any]:
    """Yields the records of an offline run: LevelDB's log format after a header of 7 bytes, records of one piece."""
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, place = path.read_bytes(), 7
    while place + 7 <= len(data):
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:  # the rest of a block
            break
        assert kind == 1, "a record of several pieces"
        record = messages.Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        yield record
        place += 7 + length


class silent_server:  # noqa: N801  # read as a function
    """A server on this machine that takes connections and never answers."""

    def __enter__(self) -> int:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_the_process_needs_no_shell_and_no_terminal() -> None:
    """It ends by itself where its parent is gone, which closes its input."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.server.tracking.tracker_process", "/no/such/run", "wandb"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "tracker wandb" in done.stdout
