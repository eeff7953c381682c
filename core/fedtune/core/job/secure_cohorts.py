"""The sizes of cohorts that can be summed securely as a job asks, whole, cut into groups, or tier by tier.

problems = grouped_cohort_problems(job, 30)     # before a job is taken
count = most_groups(job, 17, 5)                 # in a round in which only 17 clients are there
"""

from __future__ import annotations

from fedtune.core.errors import JobError
from fedtune.core.job.settings import Job, SecureAggregationSettings
from fedtune.core.secagg.graph import MIN_SURVIVORS, choose_thresholds, colluders, part

FEWEST_MEANS = 3  # fewest groups of which a robust rule can leave one out
FEWEST_TESTED = 6  # fewest groups among which one direction can be told from the usual ones


def secure_cohort_problems(job: Job, cohort: int) -> list[str]:
    """Returns the reasons why a cohort of this size cannot have one sum as the job asks; empty when it can."""
    secure = job.secure_aggregation
    off = "or set secure_aggregation.enabled = false"
    try:
        thresholds = choose_thresholds(max(cohort, MIN_SURVIVORS), secure.max_corrupt, secure.max_dropout)
    except JobError as error:
        return [f"secure_aggregation: {problem}, {off}" for problem in error.problems]
    minimum = min(cohort, thresholds.minimum)
    if minimum < MIN_SURVIVORS:
        lower = " or lower secure_aggregation.max_dropout" if cohort >= MIN_SURVIVORS else f", {off}"
        problem = (
            f"secure_aggregation: of {cohort} clients a round, {minimum} may be left; a sum hides an update among at "
            f"least {MIN_SURVIVORS}. Raise federation.clients_per_round{lower}"
        )
        return [problem]
    return []


def grouped_cohort_problems(job: Job, cohort: int) -> list[str]:
    """Returns the reasons why a cohort of this size cannot be cut into the job's groups, or have a sum at all."""
    groups = job.secure_aggregation.groups
    if problems := secure_cohort_problems(job, cohort):
        return problems
    if (most := most_groups(job, cohort, groups)) < groups:
        smallest = group_sizes(cohort, min(groups, cohort))[-1]
        problem = f"secure_aggregation.groups is {groups}: of {cohort} clients a round, a group would have {smallest}"
        remedy = f"expected at most {most}, or a larger federation.clients_per_round"
        return [f"{problem}, which is not enough for a sum of its own; {remedy}"]
    return []


def most_groups(job: Job, cohort: int, wanted: int) -> int:
    """Returns the largest number of groups up to `wanted` of which each can be summed by itself; at least 1."""
    for groups in range(min(wanted, cohort), 1, -1):
        if not any(secure_cohort_problems(job, size) for size in set(group_sizes(cohort, groups))):
            return groups
    return 1


def group_sizes(cohort: int, groups: int) -> list[int]:
    """Returns the sizes of nearly equal groups, larger ones first."""
    return [cohort // groups + (place < cohort % groups) for place in range(groups)]


def tier_minimum(settings: SecureAggregationSettings, cohort: int) -> int:
    """Returns the fewest clients that a tier's sum may include: two honest ones beside all that may collude."""
    return max(MIN_SURVIVORS, colluders(settings.max_corrupt, cohort) + 2)


def tier_least(settings: SecureAggregationSettings, cohort: int) -> int:
    """Returns the fewest clients of which `tier_minimum` remain after the largest permitted dropout."""
    minimum, dropout = tier_minimum(settings, cohort), settings.max_dropout
    least = minimum
    while least - part(dropout, least) < minimum:
        least += 1
    return least
