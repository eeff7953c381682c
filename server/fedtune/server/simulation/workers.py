"""How many processes train the clients of a simulation, where the job leaves that to the machine."""

from __future__ import annotations

from collections.abc import Callable

from fedtune.client.plan.machine import Machine, probe
from fedtune.client.plan.planner import RESERVE
from fedtune.client.plan.step_costs import Choices, predict_memory
from fedtune.core.errors import JobError
from fedtune.core.job.settings import Job
from fedtune.model.base_model import BaseModel
from fedtune.model.shape import shape_of
from fedtune.server.simulation.simulated_fleet import PROGRAM_BYTES
from fedtune.strategies.cohorts.selection import cohort_size


def worker_count(job: Job, base: BaseModel, population: int, probe: Callable[[], Machine] = probe) -> int:
    """The job's workers: as it says, or one a core or GPU, for no more clients than a round has, within free memory.

    Args:
        probe: looks at the machine.

    Raises:
        JobError: forks on a GPU.
    """
    settings, on_gpu = job.simulation, base.device.type == "cuda"
    if settings.workers != "auto":
        if settings.backend == "local" and settings.workers > 1 and on_gpu:
            problem = f"simulation.workers is {settings.workers}, but forks cannot share a base model on a GPU; "
            raise JobError([problem + 'expected simulation.workers = 1 or simulation.backend = "ray"'])
        return settings.workers
    if settings.backend == "local" and (on_gpu or settings.threads != 1):
        return 1
    machine = probe()
    places = len(machine.gpus) if on_gpu else min(int(machine.cores), _that_fit(job, base, machine.memory_free))
    return max(1, min(places, cohort_size(job.federation.clients_per_round, population)))


def _that_fit(job: Job, base: BaseModel, free: int) -> int:
    """How many workers the free memory is enough for, by the planner's formula."""
    choices = Choices(
        weights=base.weights,
        precision=base.precision,
        rank=job.adapter.rank,
        sequence_length=job.data.sequence_length,
        tokens=job.training.batch_tokens,
        checkpointing=job.training.gradient_checkpointing,
    )
    predicted = predict_memory(shape_of(job.model), choices)
    actor, fork = PROGRAM_BYTES + predicted.peak, predicted.training - predicted.weights
    return int(free * (1 - RESERVE) / (actor if job.simulation.backend == "ray" else fork))
