"""The trackers of a run: each gets every round once, and none that fails, hangs or is missing touches the run."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from fedtune.core.errors import JobError, MissingExtraError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import TrackerName
from fedtune.data.job_inputs import JobInputs
from fedtune.server.preflight import check_server_job, simulation_problems
from fedtune.server.tracking.run_trackers import RunTrackers
from fedtune.server.tracking.tracked_figures import Setting, round_figures
from fedtune.server.tracking.tracker_libraries import Target, check_installed
from fedtune.server.tracking.tracker_process import Follower, without_secrets

MakeRun = Callable[..., Path]


class Store:
    """A tracker's store, with all that it was told; `down` makes it refuse."""

    def __init__(self) -> None:
        self.down = ""
        self.runs: list[str] = []
        self.told: list[tuple[int, Mapping[str, float]]] = []
        self.configured: Mapping[str, Setting] = {}
        self.ends: list[tuple[str | None, Mapping[str, float]]] = []

    def open(self, name: TrackerName, target: Target) -> Tracker:
        self.refuse()
        if target.known not in self.runs:
            self.runs.append(f"{name}-{len(self.runs)}")
        return Tracker(self, target.known or self.runs[-1])

    def refuse(self) -> None:
        if self.down:
            raise ConnectionError(self.down)

    @property
    def rounds(self) -> list[int]:
        return [number for number, _ in self.told]


class Tracker:
    shown = "in memory"

    def __init__(self, store: Store, run: str) -> None:
        self._store, self.run = store, run

    def settings(self, values: Mapping[str, Setting]) -> None:
        self._store.configured = values

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        self._store.refuse()
        self._store.told.append((number, figures))

    def end(self, status: str | None, figures: Mapping[str, float]) -> None:
        self._store.ends.append((status, figures))


def follower(run: Path, store: Store, said: list[str]) -> Follower:
    return Follower(run, "mlflow", said.append, store.open)


def ended() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_costs_are_told_as_far_as_a_round_has_them(make_run: MakeRun) -> None:
    line = json.loads((make_run(rounds=1) / "rounds.jsonl").read_text().splitlines()[0])
    line["work"] = [{"flops": 3e9, "joules": None}, {"flops": 1e9, "joules": None}]
    assert round_figures(line)["cost/flops"] == 4e9
    assert "cost/joules" not in round_figures(line)
    line |= {"work": [{"flops": 3e9, "joules": 5.0}, {"flops": 1e9, "joules": 2.0}], "energy": "stated"}
    assert round_figures(line)["cost/joules"] == 7.0
    del line["work"]
    assert not any(name.startswith("cost/") for name in round_figures(line))


def test_a_tracker_gets_settings_rounds_and_summary_under_standard_names(make_run: MakeRun) -> None:
    run, store = make_run(rounds=2, dropout=lambda number, name: "gone" if name == "ada" else None), Store()
    said: list[str] = []
    follower(run, store, said).follow(ended())
    assert store.configured["federation.rounds"] == 20
    assert store.rounds == [1, 2]
    line = json.loads((run / "rounds.jsonl").read_text().splitlines()[0])
    figures = store.told[0][1]
    assert figures["eval/loss"] == line["eval"]["loss"]
    assert figures["eval/exact_match"] == line["eval"]["exact_match"]
    assert figures["train/loss"] == line["train_loss"]
    assert (figures["round/clients"], figures["round/survivors"]) == (3, 2)
    assert (figures["round/bytes_up"], figures["round/bytes_down"]) == (line["bytes"]["up"], line["bytes"]["down"])
    assert figures["round/seconds"] == line["seconds"]
    status, summary = store.ends[0]
    assert status == "finished"
    assert summary["summary/rounds"] == 2
    assert {"summary/before/loss", "summary/after/exact_match", "summary/bytes_up"} <= summary.keys()
    assert said == ["tracker mlflow: in memory"]


def test_nothing_about_a_single_client_is_sent(make_run: MakeRun) -> None:
    run, store = make_run(clients=("ada-the-first", "ben-the-second")), Store()
    follower(run, store, []).finish()
    text = json.dumps([store.told, store.ends, store.configured])
    assert not any(name in text for name in ("ada-the-first", "ben-the-second"))


def test_a_run_that_goes_on_stays_the_same_run_of_the_tracker_and_no_round_is_sent_twice(make_run: MakeRun) -> None:
    run, store = make_run(rounds=3, finished=False), Store()
    path = run / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40])  # the second line is being written
    follower(run, store, []).follow(ended())
    assert (store.rounds, store.ends) == ([1], [(None, {})])
    path.write_text("".join(lines))
    follower(run, store, []).follow(ended())
    assert (store.rounds, store.runs) == ([1, 2, 3], ["mlflow-0"])


def test_a_run_that_the_tracker_has_whole_is_not_opened_again(make_run: MakeRun) -> None:
    run, store = make_run(), Store()
    follower(run, store, []).finish()
    store.down = "away"
    said: list[str] = []
    assert follower(run, store, said).finish()
    assert said == []


def test_another_store_gets_the_whole_run(make_run: MakeRun) -> None:
    run = make_run(rounds=3, finished=False)
    follower(run, Store(), []).finish()
    with (run / "rounds.jsonl").open("a") as file:
        line = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
        file.write(json.dumps({**line, "round": 4}) + "\n")
    other = Store()
    other.runs = ["someone else's"]
    real = other.open
    other.open = lambda name, target: real(name, Target(target.path))  # type: ignore[method-assign]
    follower(run, other, []).finish()
    assert other.rounds == [1, 2, 3, 4]


def test_a_tracker_that_is_down_is_said_once_and_gets_its_rounds_when_it_is_up_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-secret-token")
    run, store, ending = make_run(), Store(), threading.Event()
    store.down = "https://user:word@host refuses a-secret-token\nsecond line"
    said: list[str] = []
    thread = threading.Thread(target=follower(run, store, said).follow, args=(ending, 0.01, 0.01))
    thread.start()
    until(lambda: bool(said))
    time.sleep(0.2)  # many more tries
    assert said == [
        "tracker mlflow fails, the run itself does not: ConnectionError: https://host refuses … second line"
    ]
    store.down = ""
    until(lambda: store.rounds == [1, 2, 3] and said[1:] != [])
    ending.set()
    thread.join(10)
    assert store.ends[0][0] == "finished"
    assert said[1:] == ["tracker mlflow: in memory"]


def test_a_tracker_that_stays_down_is_told_how_it_gets_the_run_later(make_run: MakeRun) -> None:
    run, store = make_run(), Store()
    said: list[str] = []
    store.down = "away"
    assert not follower(run, store, said).finish()
    assert said[-1].endswith(f"To send them: fedtune track {run}")
    store.down = ""
    assert follower(run, store, said).finish()
    assert store.rounds == [1, 2, 3]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_texts_for_people_hold_neither_keys_nor_users_of_addresses() -> None:
    text = "key abcdef123456 at https://ann:word@mlflow.example.org/x"
    assert without_secrets(text, {"WANDB_API_KEY": "abcdef123456"}) == "key … at https://mlflow.example.org/x"
    assert without_secrets("a short value", {"KEY": "a"}) == "a short value"


# -- processes --------------------------------------------------------------------------------------------------------


def program(text: str) -> Callable[[Path, TrackerName], Sequence[str]]:
    return lambda _run, _name: (sys.executable, "-c", text)


HANGS = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('hangs', flush=True); time.sleep(60)"


def test_a_tracker_that_hangs_delays_no_round_and_the_end_by_a_limit(tmp_path: Path) -> None:
    said: list[str] = []
    with RunTrackers(tmp_path, ("wandb", "mlflow"), said.append, program(HANGS), limit=0.5) as trackers:
        until(lambda: trackers.after_round() or len(said) == 2)  # type: ignore[func-returns-value]
        began = time.monotonic()
        for _ in range(100):
            trackers.after_round()
        assert time.monotonic() - began < 1.0
        alive = psutil.Process().children(recursive=True)
        began = time.monotonic()
    assert time.monotonic() - began < 5.0
    assert said[2:] == [
        f"tracker {name}: it did not end within 0.5 s; it may lack the last rounds and the summary. "
        f"To send them: fedtune track {tmp_path}"
        for name in ("wandb", "mlflow")
    ]
    psutil.wait_procs(alive, timeout=5)
    assert not [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_tracker_whose_process_dies_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    with RunTrackers(tmp_path, ("wandb",), said.append, program("raise SystemExit(3)")) as trackers:
        until(lambda: trackers.after_round() or bool(said))  # type: ignore[func-returns-value]
        trackers.after_round()
    assert len(said) == 1
    assert said[0].startswith("tracker wandb: its process ended with status 3, and the run goes on; it may lack")


def test_a_tracker_that_cannot_begin_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with RunTrackers(tmp_path, ("wandb",), said.append, lambda _run, _name: ("/no/such/program",)) as trackers:
        trackers.after_round()
    assert said == ["tracker wandb cannot begin, and the run goes on: No such file or directory"]


def test_the_end_is_a_byte_and_no_closed_pipe_since_forks_keep_the_pipe_open(tmp_path: Path) -> None:
    reads = "import sys; sys.stdin.buffer.read(1); print('ended', flush=True)"
    said: list[str] = []
    began = time.monotonic()
    with RunTrackers(tmp_path, ("wandb",), said.append, program(reads), limit=30) as trackers:
        other_end = trackers._processes["wandb"]._stdin.fileno()
        kept = os.dup(other_end)
    os.close(kept)
    assert said == ["ended"]
    assert time.monotonic() - began < 20


def test_an_error_of_the_run_itself_passes_through(tmp_path: Path) -> None:
    reads = program("import sys; sys.stdin.buffer.read(1)")
    with pytest.raises(KeyboardInterrupt), RunTrackers(tmp_path, ("wandb",), pytest.fail, reads):
        raise KeyboardInterrupt


def test_a_job_without_trackers_starts_no_process(tmp_path: Path) -> None:
    with RunTrackers(tmp_path, (), pytest.fail) as trackers:
        trackers.after_round()
        assert not trackers._processes


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_tracker_is_refused_by_the_job_file_with_those_that_there_are() -> None:
    with pytest.raises(JobError, match=r"tracking\.to: expected 'tensorboard', 'mlflow' or 'wandb', got 'neptune'"):
        load_job(None, ['tracking.to=["neptune"]'])


def test_a_tracker_that_is_not_installed_is_refused_before_the_run_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    job = load_job(None, ['tracking.to=["mlflow", "wandb", "mlflow"]'])
    expected = r"\[tracking\] needs the packages mlflow and wandb\. Install them with: pip install .*\[mlflow,wandb\]"
    (problem,) = simulation_problems(JobInputs(job))
    assert isinstance(problem, MissingExtraError)
    with pytest.raises(MissingExtraError, match=expected):
        raise problem
    with pytest.raises(MissingExtraError, match=expected):
        check_server_job(job)


def test_a_folder_with_the_name_of_a_package_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # W&B makes one in the working directory
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtraError):
        check_installed(("wandb",))
