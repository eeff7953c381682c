"""The base model that a job names, opened on the server, and what requests say about it."""

from __future__ import annotations

from fedtune.core.job.settings import Job
from fedtune.core.protocol.payloads import Base
from fedtune.model.base_model import load_base
from fedtune.model.lora import AdaptedModel, adapt


def open_model(job: Job) -> AdaptedModel:
    """The job's base model with the job's adapter on it.

    Raises:
        ModelError: there is no such model, or the adapter does not fit it.
    """
    base = load_base(job.model, weights=job.training.weights, precision=job.training.precision)
    return adapt(base, job.adapter)


def describe_base(job: Job, digest: str) -> Base:
    """What requests say about the base model of that digest."""
    targets = job.adapter.target_modules
    return Base(
        name=job.model.base,
        digest=digest,
        quantization=job.model.quantization,
        rank=job.adapter.rank,
        alpha=job.adapter.alpha,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        sequence_length=job.data.sequence_length,
    )
