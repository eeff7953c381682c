"""Small federations: the bundled base model, few clients, few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.server.run_display import Silent

SMALL = (
    "data.clients=4",
    "data.examples_per_client=12",
    "federation.rounds=4",
    "federation.clients_per_round=3",
    "federation.evaluate_every=2",
    "secure_aggregation.enabled=false",
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


def small_job(*overrides: str) -> Job:
    return load_job(None, [*SMALL, *overrides])


def begin_or_resume(path: Path, overrides: tuple[str, ...]) -> None:
    """What a process does that a test kills; here, where a child process can import it from."""
    from fedtune.server.simulation.simulate import resume, simulate

    if (path / "job.toml").is_file():
        resume(path, Silent())
    else:
        simulate(small_job(*overrides), path, Silent(), force=True)
