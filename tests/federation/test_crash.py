"""A run that is killed at any instant goes on, and ends where an undisturbed run ends, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from federation_helpers import SECURE, Simulate, begin_or_resume, small_job

from fedtune.core.errors import RunDirectoryError, RunError
from fedtune.server.run_directory import RunDirectory, read_rounds, read_summary
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import resume
from fedtune.server.simulation.simulate import simulate as run

OVERRIDES = (*SECURE, "federation.rounds=12", "simulation.dropout=0.1")
KILLS = 10


def test_ten_kills_at_random_instants_change_nothing(simulate: Simulate, tmp_path: Path) -> None:
    undisturbed = simulate(*OVERRIDES, name="undisturbed")
    # Children are forked from a server that has imported everything, so that kills hit the run and not its imports.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fedtune.server.simulation.simulate", "fedtune.server.report.page"])
    path = tmp_path / "killed"
    random_source = random.Random(0)
    reached = []
    for _ in range(KILLS):
        process = processes.Process(target=begin_or_resume, args=(path, OVERRIDES))
        process.start()
        while process.is_alive() and not (path / "job.toml").is_file():  # on a busy machine a start takes long
            time.sleep(0.1)
        time.sleep(random_source.uniform(0.5, 3.0))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(len(read_rounds(path)))
    summary = read_summary(path) if (path / "summary.json").is_file() else resume(path, Silent())
    assert summary["adapter_digest"] == undisturbed["adapter_digest"]
    assert summary["eval_after"] == undisturbed["eval_after"]
    assert [line["round"] for line in read_rounds(path)] == list(range(1, 13))
    assert reached == sorted(reached), "a round that was acknowledged was lost"


@pytest.fixture
def half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped after its second round of four."""

    def stop(self: Silent, record: object) -> None:
        if getattr(record, "round", 0) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Silent, "round", stop)
        with pytest.raises(KeyboardInterrupt):
            run(small_job(), tmp_path / "half", Silent())
    return tmp_path / "half"


def test_an_interrupted_run_resumes_to_the_same_adapter(half_done: Path, simulate: Simulate) -> None:
    assert len(read_rounds(half_done)) == 2
    assert resume(half_done, Silent())["adapter_digest"] == simulate(name="whole")["adapter_digest"]


def test_a_round_that_was_written_but_not_acknowledged_is_done_again(half_done: Path, simulate: Simulate) -> None:
    with (half_done / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "bytes": {"up": 10**12, "down": 0}}) + "\n" + '{"round": 4, "cut o')
    summary = resume(half_done, Silent())
    assert [line["round"] for line in read_rounds(half_done)] == [1, 2, 3, 4]
    assert summary["adapter_digest"] == simulate(name="whole")["adapter_digest"]
    assert summary["bytes"]["total"] < 10**12


def test_a_damaged_checkpoint_falls_back_to_the_one_before(half_done: Path, simulate: Simulate) -> None:
    tensors = half_done / "checkpoints" / "000002" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    assert resume(half_done, Silent())["adapter_digest"] == simulate(name="whole")["adapter_digest"]


def test_a_run_without_a_whole_checkpoint_is_refused(half_done: Path) -> None:
    for tensors in half_done.glob("checkpoints/*/state.safetensors"):
        tensors.write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint is whole"):
        resume(half_done, Silent())


class Heard(Silent):
    """A display that remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_finished_run_can_be_resumed_without_harm(simulate: Simulate, tmp_path: Path) -> None:
    first = simulate()
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"peak_rss_mb": 98_765.4}))
    heard = Heard()
    again = resume(tmp_path / "run", heard)
    assert again["adapter_digest"] == first["adapter_digest"]
    assert again["peak_rss_mb"] == 98_765.4  # what the run took, and not what writing it down took
    assert any("all rounds are done already" in note for note in heard.notes)


def test_two_processes_cannot_work_on_one_run(half_done: Path) -> None:
    holder = RunDirectory.open(half_done)
    try:
        with pytest.raises(RunDirectoryError, match="another process works on this run"):
            resume(half_done, Silent())
    finally:
        holder.close()


def test_a_run_on_another_base_is_not_continued(half_done: Path) -> None:
    state = half_done / "checkpoints" / "000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"base_digest": "f" * 64}))
    with pytest.raises(RunDirectoryError, match="the run began on another base model"):
        resume(half_done, Silent())


def test_a_full_disk_is_a_clean_message_and_a_resumable_run(
    half_done: Path, monkeypatch: pytest.MonkeyPatch, simulate: Simulate
) -> None:
    import errno

    from fedtune.server import run_directory

    def full(path: Path, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(run_directory, "append_line", full)
        with pytest.raises(RunError, match="the disk is full; what was acknowledged is safe"):
            resume(half_done, Silent())
    assert resume(half_done, Silent())["adapter_digest"] == simulate(name="whole")["adapter_digest"]
