"""A plan for a private job: what its noise will be, before anybody trains.

    plan = plan_privacy(job, layout, population=1000)

The figure that decides is the noise of a round's mean, as a share of the clip: √d·σ_sum/(n·g), with σ_sum and g in
units of the grid. Updates of many clients that agree are nearly as long as the clip; below a share of 1 the mean still
points where they point, and over rounds noise averages out while agreement does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt

from fedtune.core.adapter.layout import AdapterLayout, factor_letters
from fedtune.core.codec.ring import Ring
from fedtune.core.codec.rotation import rotated_size
from fedtune.core.codec.uplink import Compression
from fedtune.core.errors import JobError
from fedtune.core.job.methods import method_of
from fedtune.core.job.settings import Job
from fedtune.core.privacy.budget import noise_of_round, participation_problems, rounds_needed
from fedtune.server.privacy_losses import expected_losses
from fedtune.strategies.cohorts.selection import cohort_size

LISTED = (1.0, 2.0, 4.0, 8.0, 16.0)
_LOUD, _QUIET = 1.0, 0.3  # shares of the clip above which noise drowns updates, and below which it hardly matters


@dataclass(frozen=True)
class NoiseRow:
    """The noise for one ε.

    Args:
        share: norm of the noise in a round's mean, over the clip.
        bits, plain_bits: bits of a word, and of one without privacy.
        losses: task of benchmarks/privacy -> least and most points of exact match that such noise should cost there.
    """

    epsilon: float
    share: float
    bits: int
    plain_bits: int
    losses: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class PrivacyPlan:
    """The plan.

    Args:
        values: trained values of a round.
        participations: rounds in which a client has to take part for the job to have enough clients.
        rows: one for each ε, ascending; the job's own is among them.
        advice: sentences about what to change.
    """

    values: int
    clients: int
    rounds: int
    participations: int
    delta: float
    rows: tuple[NoiseRow, ...]
    advice: tuple[str, ...]


def check_private(job: Job) -> None:
    """Checks that there is anything to plan.

    Raises:
        JobError: the job has no privacy.
    """
    if job.privacy.mode == "off":
        remedy = "as by --set privacy.mode=distributed"
        raise JobError([f'privacy.mode is "off"; expected "distributed" or "central", {remedy}'])


def plan_privacy(job: Job, layout: AdapterLayout, population: int) -> PrivacyPlan:
    """Returns the plan of a job with [privacy].

    Args:
        layout: the adapter's; its sizes count.
        population: clients in all.

    Raises:
        JobError: the job has no privacy, more rounds than its clients may take part in, or noise beyond what fits.
    """
    check_private(job)
    settings, rounds = job.privacy, job.federation.rounds
    clients = cohort_size(job.federation.clients_per_round, population)
    if problems := participation_problems(job, clients, population):
        raise JobError(problems)
    factors = method_of(job.federation).factors(1, layout.factors)
    segments = [layout.segment(letter) for letter in factor_letters(factors)]
    numbers = [segment.stop - segment.start for segment in segments]
    needed = rounds_needed(job, clients, population)
    listed = sorted({*LISTED, settings.epsilon})
    rows = [row for epsilon in listed if (row := _row(job, numbers, clients, epsilon)) is not None]
    advice = _advice(job, rows, needed, population)
    return PrivacyPlan(sum(numbers), clients, rounds, needed, settings.delta, tuple(rows), advice)


def _row(job: Job, numbers: Sequence[int], clients: int, epsilon: float) -> NoiseRow | None:
    """Returns the noise for one ε; None where it does not fit."""
    settings = job.privacy
    try:
        found = noise_of_round(replace(job, privacy=replace(settings, epsilon=epsilon)), numbers, clients)
    except JobError:
        if epsilon == settings.epsilon:
            raise
        return None
    adding = clients if settings.mode == "distributed" else 1
    shares = [
        sqrt(rotated_size(count) * adding * noise.variance.value) / (clients * noise.norm)
        for count, noise in zip(numbers, found, strict=True)
    ]
    bits = max(noise.width for noise in found)
    plain = Ring(Compression.of(job).bits, clients).width
    share = hypot(*shares) / sqrt(len(numbers))
    return NoiseRow(epsilon, share, bits, plain, expected_losses(share, job.federation.rounds))


def _advice(job: Job, rows: Sequence[NoiseRow], needed: int, population: int) -> tuple[str, ...]:
    settings, advice = job.privacy, []
    share = next(row.share for row in rows if row.epsilon == settings.epsilon)
    if share > _LOUD:
        advice.append(
            f"the noise of a mean is {share:.1f} clips: updates drown. It halves with twice the clients in a round, "
            "with a quarter of the trained values (adapter.rank), or with a quarter of the participations"
        )
    elif share < _QUIET:
        advice.append(f"the noise of a mean is {share:.2f} clips: a smaller epsilon costs little")
    if needed < settings.participations:
        advice.append(
            f"privacy.participations is {settings.participations}, and {needed} are enough for these rounds: with "
            f"{needed} noise falls by {1 - sqrt(needed / settings.participations):.0%}"
        )
    if settings.mode == "distributed" and (secure := job.secure_aggregation).max_dropout > 0.1:
        advice.append(
            f"devices make up for a secure_aggregation.max_dropout of {secure.max_dropout:.0%} by more noise; a lower "
            "one needs less"
        )
    if settings.delta > population**-1.1:
        advice.append(f"privacy.delta is {settings.delta:.2g}, above 1/clients^1.1 = {population**-1.1:.2g}; lower it")
    return tuple(advice)
