"""The number of a simulation's workers when its job does not state it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fedtune.client.plan.machine import probe
from fedtune.core.errors import JobError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import ModelSettings
from fedtune.model.base_model import BaseModel, load_base
from fedtune.server.simulation.simulated_run import worker_count

GIB = 1 << 30


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(ModelSettings())


def count(base: BaseModel, *overrides: str, cores: float = 8.5, memory_free: int = 64 * GIB) -> int:
    """Returns the number of workers on a machine with these cores and memory."""
    machine = dataclasses.replace(probe(), cores=cores, memory_free=memory_free)
    return worker_count(load_job(None, list(overrides)), base, population=100, probe=lambda: machine)


def test_there_is_one_worker_a_core_but_none_without_a_client(base: BaseModel) -> None:
    assert count(base) == 8
    assert count(base, "federation.clients_per_round=5", "secure_aggregation.enabled=false") == 5
    assert count(base, "federation.clients_per_round=0.07", "secure_aggregation.enabled=false") == 7


def test_a_machine_of_half_a_core_has_one_worker(base: BaseModel) -> None:
    assert count(base, cores=0.5) == 1


def test_memory_bounds_the_workers_and_longer_batches_need_more_of_it(base: BaseModel) -> None:
    few = count(base, "training.batch_tokens=16384", memory_free=4 * GIB)
    assert 1 <= few < count(base, "training.batch_tokens=4096", memory_free=4 * GIB) < 8
    assert count(base, memory_free=0) == 1


def test_actors_of_ray_each_need_a_base_too(base: BaseModel) -> None:
    assert count(base, "simulation.backend=ray", memory_free=GIB) < count(base, memory_free=GIB)


def test_what_a_job_says_is_taken_and_threads_leave_no_room_for_forks(base: BaseModel) -> None:
    assert count(base, "simulation.workers=3") == 3
    assert count(base, "simulation.threads=4") == 1


def test_forks_on_a_gpu_are_refused_and_never_chosen(base: BaseModel) -> None:
    on_gpu = dataclasses.replace(base, network=SimpleNamespace(device=torch.device("cuda")))
    assert count(on_gpu) == 1
    with pytest.raises(JobError, match="forks cannot share a base model on a GPU"):
        count(on_gpu, "simulation.workers=2")
