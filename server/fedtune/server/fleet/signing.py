"""The owner's signature under a job: its terms on the very base model that the signer holds."""

from __future__ import annotations

import time

from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import DAYS, JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.secagg.identity import Identity
from fedtune.model.shape import adapted_modules, shape_of
from fedtune.server.job_model import describe_base, open_model

_DAY = 86_400.0


def sign_job(key: Identity, job: Job, name: str, days: float = DAYS) -> JobManifest:
    """Returns the manifest of a job; the base model is loaded for its digest, and the adapter for the fixed factors'.

    Raises:
        ModelError: the base model does not exist, or the adapter does not fit it.
    """
    adapted_modules(shape_of(job.model).linear, job.adapter)  # refuses a wrong adapter before the weights are loaded
    model = open_model(job)
    terms = JobTerms(with_learning_rate(job, model.layout), describe_base(job, model))
    return JobManifest.sign(key, name, terms, time.time() + days * _DAY)
