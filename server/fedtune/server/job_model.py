"""The job's base model on the server, and its description for requests."""

from __future__ import annotations

from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Base
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base


def open_model(job: Job) -> AdaptedModel:
    """Loads the job's base model and adds the job's adapter.

    Raises:
        ModelError: the model does not exist, or the adapter does not fit it.
    """
    base = load_base(job.model, weights=job.training.weights, precision=job.training.precision)
    return adapt(base, job.adapter)


def describe_base(job: Job, model: AdaptedModel) -> Base:
    """Returns the description of a job's base model and adapter that requests contain."""
    targets = job.adapter.target_modules
    return Base(
        name=job.model.base,
        digest=model.base.digest,
        quantization=job.model.quantization,
        rank=job.adapter.rank,
        alpha=job.adapter.alpha,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        sequence_length=job.data.sequence_length,
        kind=job.adapter.kind,
        fixed=model.layout.fixed_digest,
    )
