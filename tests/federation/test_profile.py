"""A profiled simulation gives the same bits, and says of every process where its time went."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from federation_helpers import SECURE, small_job, without_pictures
from traces import read_trace

from fedtune.core.errors import JobError, RunError
from fedtune.server.run_directory import PROFILE, TRACE
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import resume, simulate

WORKERS = "simulation.workers=2"
SHORT = ("federation.rounds=2", "training.local_steps=1")
CLIENTS = ("receiving the adapter", "loading data", "planning", "training", "encoding", "scoring")
SERVER = {
    *("loading model and data", "selection", "writing requests", "sending", "waiting for clients"),
    *("taking in answers", "aggregation", "server step", "evaluation", "record and checkpoint", "report"),
}


def profiled(path: Path, *overrides: str, display: Silent | None = None) -> dict[str, Any]:
    with without_pictures():
        return simulate(small_job(*SHORT, *overrides), path, display or Silent(), profile=True)


def plain(path: Path, *overrides: str) -> dict[str, Any]:
    with without_pictures():
        return simulate(small_job(*SHORT, *overrides), path, Silent())


def works(spans: list[dict[str, Any]], thread: str) -> set[str]:
    return {span["name"] for span in spans if span["thread"].startswith(thread)}


@pytest.mark.parametrize(
    ("kind", "workers", "clients"),
    [
        (("data.holdout=0.2",), 1, CLIENTS),
        (("data.holdout=0.2", WORKERS), 2, CLIENTS),
        ((*SECURE, WORKERS, "simulation.dropout=0.1"), 2, ("masking", "exchange query.share", "exchange query.unmask")),
        ((*SECURE, WORKERS, "simulation.together=2"), 2, ("masking", "training", "pass", "training with others")),
    ],
)
def test_a_profile_changes_no_bit_and_shows_every_worker(
    kind: tuple[str, ...], workers: int, clients: tuple[str, ...], tmp_path: Path
) -> None:
    without, summary = plain(tmp_path / "plain", *kind), profiled(tmp_path / "run", *kind)
    for key in ("adapter_digest", "eval_after", "client_evaluation", "records", "bytes"):
        assert summary[key] == without[key], key
    assert not (tmp_path / "plain" / TRACE).exists()
    spans = read_trace(tmp_path / "run" / TRACE)
    lives = [span for span in spans if span["name"] == "worker"]
    assert {span["args"]["about"] for span in lives} == {f"worker {number}" for number in range(1, workers + 1)}
    assert {span["pid"] for span in lives} == {span["pid"] for span in spans if span["name"] == "training"}
    assert works(spans, "worker") | works(spans, "client") >= set(clients)
    assert works(spans, "server") >= SERVER - ({"evaluation"} if "data.evaluation=" in kind else set())
    rounds = [span["args"]["about"] for span in spans if span["name"] == "round"]
    assert rounds == [str(number) for number in range(1, summary["rounds"] + 1)]
    assert_adds_up(tmp_path / "run" / PROFILE)


def assert_adds_up(path: Path) -> None:
    """Asserts that the shares of each part of the table are all of its time, and none is negative."""
    for part in path.read_text(encoding="utf-8").split("\n\n")[1:]:
        shares = [float(line.partition("%")[0].split()[-1]) for line in part.splitlines() if "%" in line]
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


class Interrupted(Silent):
    """Interrupts a run after its first round."""

    def round(self, record: Any) -> None:
        if record.round == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [(), (WORKERS,)])
def test_an_interrupted_run_leaves_the_profile_of_its_rounds(workers: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        profiled(tmp_path / "run", *workers, display=Interrupted())
    spans = read_trace(tmp_path / "run" / TRACE)
    assert sum(span["name"] == "round" for span in spans) == 1
    assert "1 round," in (tmp_path / "run" / PROFILE).read_text(encoding="utf-8")
    assert_adds_up(tmp_path / "run" / PROFILE)


def test_a_resumed_run_leaves_the_profile_of_the_rounds_that_were_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), without_pictures():
        simulate(small_job(*SHORT), tmp_path / "run", Interrupted())
    assert not (tmp_path / "run" / PROFILE).exists()
    with without_pictures():
        summary = resume(tmp_path / "run", Silent(), profile=True)
    assert summary["adapter_digest"] == plain(tmp_path / "plain")["adapter_digest"]
    spans = read_trace(tmp_path / "run" / TRACE)
    assert sum(span["name"] == "round" for span in spans) == 1
    assert "loading model and data" in works(spans, "server")
    assert_adds_up(tmp_path / "run" / PROFILE)


def test_a_run_whose_worker_dies_leaves_its_profile(tmp_path: Path) -> None:
    class Murderer(Silent):
        def round(self, record: Any) -> None:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(RunError, match="a worker of the simulation ended"):
        profiled(tmp_path / "run", WORKERS, display=Murderer())
    spans = read_trace(tmp_path / "run" / TRACE)
    assert "cut off" in works(spans, "worker")


def test_ray_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(JobError, match='for --profile expected "local"'):
        profiled(tmp_path / "run", "simulation.backend=ray")
    assert not (tmp_path / "run").exists()
