"""A job's privacy budget: what each round may spend, and what a client has spent after some.

    share = rho_of_round(job.privacy)               # ρ of one client in one round
    epsilon = epsilon_after(job.privacy, 3)         # after three rounds of one client

The budget is for one client's whole data: with it or without it, whatever it is. It is spent in equal parts by the
rounds that the client takes part in, `privacy.participations` at most. Nothing is gained from the sampling of cohorts,
for a server that chooses cohorts can choose any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil

from fedtune.core.codec.rotation import rotated_size
from fedtune.core.errors import JobError
from fedtune.core.job.secure_cohorts import tier_minimum
from fedtune.core.job.settings import Job, PrivacySettings
from fedtune.core.privacy.guarantee import epsilon_of, largest_rho
from fedtune.core.privacy.mechanism import Noise, fit_noise
from fedtune.core.secagg.graph import choose_thresholds, colluders


@cache
def rho_of_round(settings: PrivacySettings) -> float:
    """Returns ρ that a client spends in each round; 0 without privacy."""
    if settings.mode == "off":
        return 0.0
    return largest_rho(settings.epsilon, settings.delta) / settings.participations


def epsilon_after(settings: PrivacySettings, rounds: int) -> float:
    """Returns ε at the job's δ that a client has spent in a number of rounds."""
    return epsilon_of(rho_of_round(settings) * rounds, settings.delta)


def participation_problems(job: Job, clients: int, population: int) -> list[str]:
    """Returns the reason why clients have too few rounds for the job; empty where they have enough.

    Args:
        clients: clients of a round.
        population: clients in all.
    """
    settings, rounds = job.privacy, job.federation.rounds
    needed = rounds_needed(job, clients, population)
    if settings.mode == "off" or needed <= settings.participations:
        return []
    problem = f"{rounds} rounds of {clients} clients out of {population} need {needed} of each"
    remedy = "raise it, or lower federation.rounds or clients_per_round"
    return [f"privacy.participations is {settings.participations}, but {problem}; {remedy}"]


def rounds_needed(job: Job, clients: int, population: int) -> int:
    """Returns the rounds in which a client has to take part if all take turns."""
    return ceil(job.federation.rounds * clients / max(population, 1))


def noise_of_round(job: Job, numbers: Sequence[int], clients: int) -> list[Noise]:
    """Returns the noise of each factor in a round whose clients all train the whole adapter.

    Args:
        numbers: trained values, by factor of a round.

    Raises:
        JobError: there is none that fits; the message says what to change.
    """
    words = [count if job.compression.rotation is False else rotated_size(count) for count in numbers]
    noised, rho = sum(certainly_noised(job, (clients,))), rho_of_round(job.privacy) / len(numbers)
    return [fit_noise(count, noised=max(noised, 1), n_max=clients, rho=rho) for count in words]


def certainly_noised(job: Job, by_tier: Sequence[int]) -> tuple[int, ...]:
    """Returns how many clients of each slice's sum add noise for certain, the smallest tier's slice first.

    There are none where the server adds the noise.

    Args:
        by_tier: clients of each tier of the round, ascending; one number where all train the whole adapter.

    Raises:
        JobError: so few clients cannot have a sum.
    """
    if job.privacy.mode != "distributed":
        return ()
    secure, clients = job.secure_aggregation, sum(by_tier)
    minimum = choose_thresholds(clients, secure.max_corrupt, secure.max_dropout).minimum
    least = (tier_minimum(secure, clients) if len(by_tier) > 1 else 0,) * len(by_tier)
    found = honest_survivors(by_tier, minimum, least, colluders(secure.max_corrupt, clients))
    if min(found) < 1:
        raise JobError([f"privacy: of {clients} clients in a sum none is sure to add noise; ask more clients a round"])
    return found


def honest_survivors(
    by_tier: Sequence[int], minimum: int, tier_minimums: Sequence[int], colluding: int
) -> tuple[int, ...]:
    """Returns the fewest honest clients in each slice's sum; its owners are a tier and all above it.

    All who vanish may be owners of the slice, yet every tier keeps its own minimum; all who collude may be owners, too.

    Args:
        by_tier: clients of each tier, ascending.
        minimum: fewest survivors of all clients.
        tier_minimums: fewest survivors of each tier.
    """
    missing = sum(by_tier) - minimum
    return tuple(
        max(sum(by_tier[place:]) - missing, sum(tier_minimums[place:])) - colluding for place in range(len(by_tier))
    )
