"""Small federations: the bundled base model, few clients, few steps, few examples to evaluate on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import pytest
from matplotlib.figure import Figure

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.server.run_directory import CLIENTS, RunDirectory
from fedtune.server.run_display import Display, Silent
from fedtune.server.simulation.simulate import resume, simulate
from fedtune.server.simulation.simulated_run import run_job
from fedtune.server.simulation.simulation_context import SimulationContext, Wrap

EVALUATION = Path(__file__).with_name("evaluation.jsonl")  # the first 40 of the demo's 240

SMALL = (
    "adapter.kind=lora",
    "adapter.rank=16",
    "data.clients=4",
    "data.examples_per_client=12",
    f"data.evaluation={EVALUATION}",
    "federation.rounds=4",
    "federation.clients_per_round=3",
    "federation.evaluate_every=2",
    "secure_aggregation.enabled=false",
    "training.learning_rate=2e-3",
    "training.local_steps=2",
    "training.batch_tokens=256",
    "training.precision=fp32",
    "simulation.threads=1",
    "simulation.workers=1",
)

SECURE = (
    "secure_aggregation.enabled=true",
    "data.clients=6",
    "federation.clients_per_round=5",
    "federation.rounds=2",
    "data.evaluation=",
    "training.local_steps=1",
)

Simulate = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class FinishedRun:
    """A run that tests share; no test may change its directory.

    Args:
        path: the run directory.
        summary: the summary that `simulate` returned.
    """

    path: Path
    summary: Mapping[str, Any]

    def copied(self, path: Path) -> Path:
        """Returns a copy of a run directory that a test may change."""
        return Path(shutil.copytree(self.path, path))


def small_job(*overrides: str) -> Job:
    return load_job(None, [*SMALL, *overrides])


@contextmanager
def without_pictures() -> Iterator[None]:
    """Leaves a report's pictures blank, since drawing them takes longer than most of these federations."""

    def blank(figure: Figure, target: TextIO, **settings: object) -> None:
        target.write("<svg></svg>")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Figure, "savefig", blank)
        yield


def run(
    job: Job, path: Path, display: Display | None = None, *, force: bool = False, wrap: Wrap | None = None
) -> dict[str, Any]:
    """Simulates a job from its beginning, without pictures.

    Args:
        wrap: the clients answer through wrap(their handler).
    """
    with without_pictures():
        if wrap is None:
            return simulate(job, path, display or Silent(), force=force)
        context = SimulationContext.begin(job, path / CLIENTS, wrap=wrap)
        with closing(RunDirectory.create(path, job, context.base.digest)) as directory:
            return run_job(context, directory, display or Silent())


def go_on(path: Path, display: Display | None = None) -> dict[str, Any]:
    """Resumes a run, without pictures."""
    with without_pictures():
        return resume(path, display or Silent())


def fork(*overrides: str, path: Path) -> BaseProcess:
    """Begins a run, or resumes it, in a fork of this process, which has imported everything already.

    A fork is killed like any process, and the kill hits the run and not its imports.
    """
    process = get_context("fork").Process(target=_begin_or_resume, args=(path, overrides))
    process.start()
    return process


def _begin_or_resume(path: Path, overrides: tuple[str, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if (path / "job.toml").is_file():
        go_on(path)
    else:
        run(small_job(*overrides), path, force=True)
