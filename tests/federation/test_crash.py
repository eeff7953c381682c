"""A run that is killed at any instant can be resumed, and equals an undisturbed run bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from federation_helpers import SECURE, FinishedRun, Simulate, fork, go_on, run, small_job

from fedtune.core.errors import RunDirectoryError, RunError
from fedtune.server.run_directory import CHECKPOINTS, RunDirectory, read_rounds, read_summary
from fedtune.server.run_display import Silent

OVERRIDES = (*SECURE, "federation.rounds=12", "simulation.dropout=0.1")
KILLS = 10


def acknowledged(path: Path) -> int:
    """Returns the last round whose checkpoint appeared; its line in rounds.jsonl may already have a successor."""
    return max((int(each.name) for each in (path / CHECKPOINTS).glob("[0-9]*") if each.name.isdigit()), default=0)


def test_ten_kills_at_random_instants_change_nothing(simulate: Simulate, tmp_path: Path) -> None:
    started = time.monotonic()
    undisturbed = simulate(*OVERRIDES, name="undisturbed")
    # So that there is something left to kill at the tenth, on a fast machine and on a slow or busy one.
    longest = 2 * (time.monotonic() - started) / KILLS
    path = tmp_path / "killed"
    random_source = random.Random(0)
    reached = []
    for _ in range(KILLS):
        process = fork(*OVERRIDES, path=path)
        while process.is_alive() and not (path / "job.toml").is_file():  # on a busy machine a start takes long
            time.sleep(0.1)
        time.sleep(random_source.uniform(0.1, longest))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(acknowledged(path))
    summary = read_summary(path) if (path / "summary.json").is_file() else go_on(path)
    assert summary["adapter_digest"] == undisturbed["adapter_digest"]
    assert summary["eval_after"] == undisturbed["eval_after"]
    assert [line["round"] for line in read_rounds(path)] == list(range(1, 13))
    assert reached == sorted(reached), "a round that was acknowledged was lost"


class Interrupted(Silent):
    """A display that raises KeyboardInterrupt when the second round is shown."""

    def round(self, record: object) -> None:
        if getattr(record, "round", 0) == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Makes a run that stopped after its second round of four."""
    path = tmp_path_factory.mktemp("stopped") / "half"
    with pytest.raises(KeyboardInterrupt):
        run(small_job(), path, Interrupted())
    return FinishedRun(path, {})


@pytest.fixture
def half_done(stopped: FinishedRun, tmp_path: Path) -> Path:
    """Copies the stopped run."""
    return stopped.copied(tmp_path / "half")


def test_an_interrupted_run_resumes_to_the_same_adapter(half_done: Path, whole: FinishedRun) -> None:
    assert len(read_rounds(half_done)) == 2
    resumed = go_on(half_done)
    assert resumed["adapter_digest"] == whole.summary["adapter_digest"]
    assert resumed["records"] == whole.summary["records"]


def test_a_round_that_was_written_but_not_acknowledged_is_done_again(half_done: Path, whole: FinishedRun) -> None:
    with (half_done / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "bytes": {"up": 10**12, "down": 0}}) + "\n" + '{"round": 4, "cut o')
    summary = go_on(half_done)
    assert [line["round"] for line in read_rounds(half_done)] == [1, 2, 3, 4]
    assert summary["adapter_digest"] == whole.summary["adapter_digest"]
    assert summary["bytes"]["total"] < 10**12


def test_a_damaged_checkpoint_falls_back_to_the_one_before(half_done: Path, whole: FinishedRun) -> None:
    tensors = half_done / "checkpoints" / "000002" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    assert go_on(half_done)["adapter_digest"] == whole.summary["adapter_digest"]


def test_a_run_without_a_whole_checkpoint_is_refused(half_done: Path) -> None:
    for tensors in half_done.glob("checkpoints/*/state.safetensors"):
        tensors.write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint is whole"):
        go_on(half_done)


class Heard(Silent):
    """A display that records its calls."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_finished_run_can_be_resumed_without_harm(whole: FinishedRun, tmp_path: Path) -> None:
    path = whole.copied(tmp_path / "run")
    summary = path / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"peak_rss_mb": 98_765.4}))
    heard = Heard()
    again = go_on(path, heard)
    assert again["adapter_digest"] == whole.summary["adapter_digest"]
    assert again["records"] == whole.summary["records"]
    assert again["peak_rss_mb"] == 98_765.4  # the run's own peak, not that of writing the summary
    assert any("all rounds are done already" in note for note in heard.notes)


def test_two_processes_cannot_work_on_one_run(half_done: Path) -> None:
    holder = RunDirectory.open(half_done)
    try:
        with pytest.raises(RunDirectoryError, match="another process works on this run"):
            go_on(half_done)
    finally:
        holder.close()


def test_a_run_on_another_base_is_not_continued(half_done: Path) -> None:
    state = half_done / "checkpoints" / "000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"base_digest": "f" * 64}))
    with pytest.raises(RunDirectoryError, match="the run began on another base model"):
        go_on(half_done)


@pytest.mark.parametrize("recorded", [{"terms_digest": "f" * 64}, {"terms_digest": ""}])
def test_a_run_on_other_terms_is_not_continued(half_done: Path, recorded: dict[str, str]) -> None:
    state = half_done / "checkpoints" / "000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | recorded))
    with pytest.raises(RunDirectoryError, match=r"other terms than its job\.toml has now, or with an earlier release"):
        go_on(half_done)


def test_a_full_disk_is_a_clean_message_and_a_resumable_run(
    half_done: Path, monkeypatch: pytest.MonkeyPatch, whole: FinishedRun
) -> None:
    import errno

    from fedtune.server import run_directory

    def full(path: Path, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(run_directory, "append_line", full)
        with pytest.raises(RunError, match="the disk is full; what was acknowledged is safe"):
            go_on(half_done)
    assert go_on(half_done)["adapter_digest"] == whole.summary["adapter_digest"]


@pytest.mark.parametrize("weights", ["packed", "dequantized"])
def test_a_base_in_int4_is_trained_and_resumed_like_any_other(tmp_path: Path, weights: str) -> None:
    settings = ('model.quantization="int4"', f'training.weights="{weights}"', "federation.rounds=3")
    whole = run(small_job(*settings), tmp_path / "whole")
    assert whole["eval_after"]["loss"] < whole["eval_before"]["loss"]
    with pytest.raises(KeyboardInterrupt):
        run(small_job(*settings), tmp_path / "half", Interrupted())
    assert go_on(tmp_path / "half")["adapter_digest"] == whole["adapter_digest"]
