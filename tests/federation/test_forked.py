"""Forked workers give the same result as one process, bit for bit, and never outlive it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from federation_helpers import SECURE, SMALL, FinishedRun, Simulate, fork, go_on, run, small_job

from fedtune.core.errors import RunError
from fedtune.model.adapted_model import AdaptedModel
from fedtune.server.run_directory import read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.executors import ForkedExecutor
from fedtune.server.simulation.simulation_context import SimulationContext

WORKERS = "simulation.workers=2"
FAULTS = ("simulation.dropout=0.2", "simulation.failing=0.2", "data.holdout=0.2")
PATIENCE = 90.0  # seconds, on a busy machine


@pytest.mark.parametrize("kind", [FAULTS, (*SECURE, "simulation.dropout=0.1", "federation.rounds=3")])
def test_the_number_of_workers_changes_no_bit(kind: tuple[str, ...], simulate: Simulate, tmp_path: Path) -> None:
    alone, spread = simulate(*kind, name="alone"), simulate(*kind, WORKERS, name="spread")
    for key in ("adapter_digest", "eval_after", "client_evaluation", "records", "bytes"):
        assert spread[key] == alone[key], key

    def told(name: str) -> list[Any]:
        return [
            [(client["id"], client["dropped"], client["bytes_up"]) for client in line["clients"]]
            for line in read_rounds(tmp_path / name)
        ]

    assert told("spread") == told("alone")


class FrozenObjects:
    """A piece of work that counts the objects at which the garbage collector never looks."""

    def compute(self, model: AdaptedModel) -> int:
        return gc.get_freeze_count()


def test_the_collector_of_a_fork_leaves_the_objects_alone_that_it_shares(tmp_path: Path) -> None:
    context = SimulationContext.begin(small_job(), tmp_path)
    executor = ForkedExecutor(context, {1: "1"}, workers=1)
    try:
        ((_, frozen),) = executor.spread(context.model.layout.initial(0), [FrozenObjects()])
    finally:
        executor.close()
    assert frozen > 100_000, "torch and transformers alone make more"
    assert gc.get_freeze_count() == 0, "this process collects as before"


def test_a_worker_that_dies_ends_the_run_with_a_reason_and_it_can_be_resumed(
    whole: FinishedRun, tmp_path: Path
) -> None:
    class Murderer(Silent):
        def round(self, record: Any) -> None:
            if record.round == 2:
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(RunError, match="a worker of the simulation ended with exit status -9"):
        run(small_job(WORKERS), tmp_path / "hurt", Murderer())
    assert not multiprocessing.active_children()
    assert [line["round"] for line in read_rounds(tmp_path / "hurt")] == [1, 2]
    assert go_on(tmp_path / "hurt")["adapter_digest"] == whole.summary["adapter_digest"]


def test_workers_die_with_a_killed_server_even_in_the_middle_of_a_client(whole: FinishedRun, tmp_path: Path) -> None:
    path = tmp_path / "killed"
    overrides = (WORKERS, "simulation.slow=1.0", "simulation.slow_seconds=3600.0")
    process = fork(*overrides, path=path)
    server = psutil.Process(process.pid)
    wait_for(lambda: len(server.children()) == 2 and (path / "checkpoints").is_dir())
    workers = server.children()
    server.kill()
    process.join()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive
    job = path / "job.toml"
    job.write_text(job.read_text().replace("slow = 1.0", "slow = 0.0"))
    assert go_on(path)["adapter_digest"] == whole.summary["adapter_digest"]


def test_ctrl_c_ends_the_run_and_its_workers(tmp_path: Path) -> None:
    path = tmp_path / "run"
    overrides = [part for override in (*SMALL, WORKERS, "federation.rounds=200") for part in ("--set", override)]
    command = [sys.executable, "-m", "fedtune.server.cli", "simulate", *overrides, "--out", str(path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:
        wait_for(lambda: path.is_dir() and bool(read_rounds(path)))
        workers = psutil.Process(process.pid).children()
        os.killpg(process.pid, signal.SIGINT)
        _, complaints = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert complaints == f"interrupted; what finished is safe, go on with: fedtune resume {path}\n"
    assert len(workers) >= 2
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
