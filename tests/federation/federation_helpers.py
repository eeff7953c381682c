"""Small federations: the bundled base model, few clients, few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.core.job import Job, load_job

SMALL = (
    "data.clients=4",
    "data.examples_per_client=12",
    "federation.rounds=4",
    "federation.clients_per_round=3",
    "federation.evaluate_every=2",
    "training.local_steps=2",
    "training.batch_tokens=256",
    "training.precision=fp32",
    "simulation.threads=1",
)

Simulate = Callable[..., dict[str, Any]]


def small_job(*overrides: str) -> Job:
    return load_job(None, [*SMALL, *overrides])
