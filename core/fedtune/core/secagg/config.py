"""The configuration of a secure round: the server makes it, and each client checks it against its own policy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedtune.core.errors import JobError
from fedtune.core.secagg.exchanged import Member, RoundConfig, Segment, increasing
from fedtune.core.secagg.graph import MIN_SURVIVORS, Thresholds, choose_thresholds, colluders, problems
from fedtune.core.secagg.primitives import DIGEST_BYTES, Random
from fedtune.core.secagg.round_log import RoundMark
from fedtune.core.text import counted


@dataclass(frozen=True)
class Policy:
    """A client's own requirements for a secure round, which no server can lower.

    Attributes:
        max_corrupt: share of the cohort that may collude with the server, γ.
        min_survivors: fewest clients with which the client agrees to be summed, itself included.
        min_tier_survivors: fewest survivors within every tier; segments of one tier are summed over that tier alone.
        min_tier_honest: fewest of them that must be honest if all colluding clients are in that tier.
        max_sums: most sums of one job in which the client takes part; None for no bound.
        min_difference: fewest clients by which two different sets of survivors of one job must differ; 0 for no bound.
        rho: ρ that a sum of the job spends under differential privacy; 0 without.
        most_rho: most ρ that the client spends in all jobs together; None for no bound, and for jobs without privacy.
    """

    max_corrupt: float = 0.1
    min_survivors: int = MIN_SURVIVORS
    min_tier_survivors: int = MIN_SURVIVORS
    min_tier_honest: int = 2
    max_sums: int | None = None
    min_difference: int = 0
    rho: float = 0.0
    most_rho: float | None = None


@dataclass(frozen=True)
class Subject:
    """The round for which a configuration is made; clients refuse one for another round.

    Attributes:
        job: name of the run.
        base_digest, adapter_digest: digests of the base model and of the adapter that is sent, in hexadecimal.
        context: further data on which all must agree, such as a digest of the codec's terms.
    """

    job: str
    mark: RoundMark
    base_digest: str
    adapter_digest: str
    context: bytes = b""


@dataclass(frozen=True)
class Assumptions:
    """The failures that a round must tolerate.

    Attributes:
        max_corrupt: share of the cohort that may collude with the server, γ.
        max_dropout: share that may drop out before the round is over, δ.
        min_tier_survivors: fewest clients over which a tier is summed.
    """

    max_corrupt: float
    max_dropout: float
    min_tier_survivors: int = MIN_SURVIVORS


def round_config(
    subject: Subject,
    cohort: Sequence[Member],
    segments: Sequence[Segment],
    assumptions: Assumptions,
    random: Random = os.urandom,
) -> RoundConfig:
    """Returns a configuration with the thresholds that the assumptions ask for.

    Raises:
        JobError: such a round cannot be safe, or the cohort and the segments contradict each other.
    """
    thresholds = choose_thresholds(len(cohort), assumptions.max_corrupt, assumptions.max_dropout)
    tiers = 1 + max((member.tier for member in cohort), default=0)
    config = RoundConfig(
        job=subject.job,
        round=subject.mark.round,
        attempt=subject.mark.attempt,
        nonce=random(DIGEST_BYTES),
        base_digest=subject.base_digest,
        adapter_digest=subject.adapter_digest,
        context=subject.context,
        cohort=tuple(cohort),
        tier_minimums=(assumptions.min_tier_survivors,) * tiers,
        segments=tuple(segments),
        degree=thresholds.degree,
        threshold=thresholds.threshold,
        quorum=thresholds.quorum,
        minimum=thresholds.minimum,
    )
    found = config_problems(config)
    if not found and (missing := shortfall(config, range(len(cohort)))):
        found = [f"cohort: {missing}"]
    if found:
        raise JobError(found)
    return config


def thresholds_of(config: RoundConfig) -> Thresholds:
    return Thresholds(len(config.cohort), config.degree, config.threshold, config.quorum, config.minimum)


def config_problems(config: RoundConfig) -> list[str]:
    """Returns the contradictions within a configuration; empty when there are none."""
    n = len(config.cohort)
    found = []
    repeated = [client for client, times in Counter(member.client for member in config.cohort).items() if times > 1]
    if repeated:
        found.append(f"cohort: {repeated[0]} is invited twice")
    tiers = len(config.tier_minimums)
    if any(member.tier >= tiers for member in config.cohort):
        found.append(f"cohort: a tier is not below the number of tiers, {tiers}")
    if len({segment.name for segment in config.segments}) != len(config.segments):
        found.append("segments: two have the same name")
    for segment in config.segments:
        if not increasing(segment.tiers) or segment.tiers[-1] >= tiers:
            found.append(f"segment {segment.name}: tiers must be increasing and below {tiers}")
            continue
        count = len(carriers(config, segment))
        if segment.limit is not None and count * segment.limit >= 1 << segment.bits:
            found.append(f"segment {segment.name}: {count} words up to {segment.limit} overflow {segment.bits} bits")
    if not 1 <= config.degree < n:
        found.append(f"degree {config.degree} is not in 1 to {n - 1}")
    for name, value in (("threshold", config.threshold), ("quorum", config.quorum), ("minimum", config.minimum)):
        if not 1 <= value <= n:
            found.append(f"{name} {value} is not in 1 to {n}")
    return found


def policy_problems(config: RoundConfig, policy: Policy) -> list[str]:
    """Returns the points in which a configuration is weaker than a client's policy; empty when there are none."""
    found = problems(thresholds_of(config), policy.max_corrupt)
    if config.minimum < policy.min_survivors:
        found.append(f"a minimum of {config.minimum} survivors is below this client's {policy.min_survivors}")
    lowest, least = min(config.tier_minimums), policy.min_tier_survivors
    if len({member.tier for member in config.cohort}) > 1:  # with one tier, the minimum outnumbers the colluders
        least = max(least, colluders(policy.max_corrupt, len(config.cohort)) + policy.min_tier_honest)
    if lowest < least:
        found.append(f"a tier minimum of {lowest} survivors is below this client's {least}")
    return found


def shortfall(config: RoundConfig, present: Iterable[int]) -> str | None:
    """Returns the reason why these clients are too few to be summed, in total or in a tier; None if they are enough.

    Args:
        present: indices of the clients in the cohort.
    """
    clients = list(present)
    if len(clients) < config.minimum:
        return f"{counted(len(clients), 'client')}, expected at least {config.minimum}"
    by_tier = Counter(config.cohort[index].tier for index in clients)
    for tier in sorted({member.tier for member in config.cohort}):
        if by_tier[tier] < config.tier_minimums[tier]:
            return f"{counted(by_tier[tier], 'client')} in tier {tier}, expected at least {config.tier_minimums[tier]}"
    return None


def carriers(config: RoundConfig, segment: Segment) -> frozenset[int]:
    """Returns the indices of the clients whose tier carries the segment."""
    return frozenset(index for index, member in enumerate(config.cohort) if member.tier in segment.tiers)


def segments_of(config: RoundConfig, client: int) -> list[int]:
    """Returns the indices of the segments that the client at this index contributes to."""
    tier = config.cohort[client].tier
    return [index for index, segment in enumerate(config.segments) if tier in segment.tiers]
