"""A round derived from the terms of its job: by the server that writes it, by the device that checks.

    work = work_of_round(job, method, layout, number, deadline)      # both sides
    check_training(terms, layout, request)                           # a device, before it loads an example

A request carries the whole round, so that a device without terms, in a simulation of one's own, can follow it. A device
with terms derives the round too and refuses a request that differs. What the terms cannot know stays within bounds: the
clips within what the round's steps can reach, the tiers among the job's, the number of the round up to the last one.
"""

from __future__ import annotations

import math

import msgspec

from fedtune.core.adapter.layout import AdapterLayout, Factor, factor_letters
from fedtune.core.codec import largest_norm
from fedtune.core.codec.clipping import LEAST_SHARE
from fedtune.core.codec.uplink import Compression
from fedtune.core.errors import PeerError
from fedtune.core.job.local_work import LocalWork, local_work
from fedtune.core.job.methods import Method, method_of
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.privacy.budget import rho_of_round
from fedtune.core.protocol.messages import Base, EvaluateRequest, TrainRequest

_ROUNDING = 1e-6  # relative; two machines may round a power or a cosine differently


def scheduled_learning_rate(job: Job, number: int) -> float:
    """Returns the learning rate of a round: η, η·(1 - p) or η·(1 + cos πp)/2, with p = (number - 1) / rounds."""
    progress = min((number - 1) / job.federation.rounds, 1.0)
    match job.training.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = (1.0 + math.cos(math.pi * progress)) / 2
    return job.training.first_learning_rate * factor


def work_of_round(job: Job, method: Method, layout: AdapterLayout, number: int, deadline: float = 0.0) -> LocalWork:
    """Returns the work of every client in a round.

    Args:
        deadline: seconds after which the update should have arrived; 0 where the round waits for all clients.
    """
    return local_work(
        job.training,
        method.factors(number, layout.factors),
        learning_rate=scheduled_learning_rate(job, number),
        holdout=job.data.holdout,
        align=method.aligns,
        deadline=deadline,
    )


def reachable_norm(job: Job, layout: AdapterLayout, number: int, factor: Factor) -> float:
    """Returns the largest norm that a round's steps can give an update of a factor, but for rare ones."""
    segment = layout.segment(factor)
    work = local_work(job.training, factor, learning_rate=scheduled_learning_rate(job, number))
    return largest_norm(work.optimizer, work.learning_rate, job.training.steps, segment.stop - segment.start)


def clip_within(job: Job, layout: AdapterLayout, number: int, factor: Factor, adapted: float) -> float:
    """Returns an adapted clip within what a round's steps can reach.

    Where a job counts epochs, the steps are the clients' own, and nothing bounds the adapted clip. Under differential
    privacy no clip adapts: it is the job's share of what the steps can reach.
    """
    if job.privacy.mode != "off":
        return job.privacy.clip * reachable_norm(job, layout, number, factor)
    if job.training.local_epochs:
        return adapted
    most = reachable_norm(job, layout, number, factor)
    return min(max(adapted, LEAST_SHARE * most), most)


def check_base(terms: JobTerms, base: Base) -> None:
    """Checks that a request is for the base model and adapter of the terms.

    Raises:
        PeerError: it is for another one.
    """
    if base != terms.base:
        raise PeerError("a request for another base model or adapter than the job's terms")


def check_training(terms: JobTerms, layout: AdapterLayout, request: TrainRequest) -> None:
    """Checks that a request asks what the terms say for its round.

    Raises:
        PeerError: it differs; the message names all fields that do.
    """
    job, number, uplink = terms.job, request.round, request.uplink
    if not 1 <= number <= job.federation.rounds:
        raise PeerError(f"a request for round {number}; the job's terms have {job.federation.rounds} rounds")
    work = work_of_round(job, method_of(job.federation), layout, number, request.work.deadline)
    compression = Compression.of(job)
    form = compression.form if compression.form != "exact" else uplink.form
    pairs = {
        "seed": (request.job_seed, terms.seed),
        "local work": (_rounded(request.work), _rounded(work)),
        "form": (uplink.form, form),
        "bits": (uplink.bits, compression.bits),
        "density": (uplink.density, compression.density),
        "error feedback": (uplink.error_feedback, compression.error_feedback),
        "rotation": (uplink.rotation, compression.rotation),
        "privacy": (_six_digits(uplink.rho), _six_digits(rho_of_round(job.privacy))),
        "noise of devices": (bool(uplink.noised), job.privacy.mode == "distributed"),
    }
    wrong = [f"{what} {got}, expected {due}" for what, (got, due) in pairs.items() if got != due]
    letters = factor_letters(work.factors)
    if len(uplink.clips) != len(letters):
        wrong.append(f"{len(uplink.clips)} clips for {len(letters)} factors")
    for letter, clip in zip(letters, uplink.clips, strict=False):
        due = clip_within(job, layout, number, letter, clip)
        if not math.isclose(clip, due, rel_tol=_ROUNDING):
            wrong.append(f"clip {clip:.3g} of {letter}, expected {due:.3g}")
    if not set(uplink.tiers) <= set(job.tiers):
        wrong.append(f"tiers {list(uplink.tiers)}, expected some of {list(job.tiers)}")
    if request.rebasing and not (compression.error_feedback and job.federation.rebalance_every):
        wrong.append("a change of basis")
    if wrong:
        raise PeerError(f"the request differs from the job's terms: {'; '.join(wrong)}")


def check_evaluation(terms: JobTerms, request: EvaluateRequest) -> None:
    """Checks that a request to evaluate is one of the job's.

    Raises:
        PeerError: it names another seed or holdout, or a round that the job does not have, or the job has differential
            privacy, which scores would go round.
    """
    job = terms.job
    if job.privacy.mode != "off":
        raise PeerError("a request to evaluate in a job with differential privacy: scores have no noise")
    if (request.job_seed, request.holdout) != (terms.seed, job.data.holdout) or request.round > job.federation.rounds:
        raise PeerError("the request to evaluate differs from the job's terms")


def _rounded(work: LocalWork) -> tuple[object, ...]:
    """Returns the fields of a round's work, the learning rate to six digits."""
    return msgspec.structs.astuple(msgspec.structs.replace(work, learning_rate=_six_digits(work.learning_rate)))


def _six_digits(number: float) -> float:
    return float(f"{number:.5e}")
