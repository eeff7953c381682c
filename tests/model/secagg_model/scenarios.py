"""The bounds of the search, and the mutants of the model.

Numbers of devices count from 0; the last of a cohort colludes. A cohort of n has n_min, t and q as an honest server
chooses them, unless a mutant takes away the check of a worse choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secagg_model.devices import Config, Rules
from secagg_model.search import Scenario


@dataclass(frozen=True)
class Mutant:
    """Rules of which one is missing, and a promise that then breaks in the scenario."""

    name: str
    rules: Rules
    scenario: Scenario
    breaks: str


THREE = Config(1, 0, cohort=0b111, threshold=3, quorum=3, minimum=3)
FOUR = Config(1, 0, cohort=0b1111, threshold=3, quorum=3, minimum=3)
FIVE = Config(1, 0, cohort=0b11111, threshold=4, quorum=4, minimum=4)
AGAIN = replace(FOUR, attempt=1)
NEXT = replace(FOUR, round=2)
RENAMED = replace(FOUR, job="other name")  # the same seed and work, so the same updates
OTHER_JOB = replace(THREE, job="other", digest="other")
OVERLAPPING = (replace(FOUR, cohort=0b10111), replace(FOUR, cohort=0b11110, attempt=1))  # of a fleet of five

ONE_ATTEMPT = Scenario("one attempt, n = 4, any keys of the colluder", (FOUR,), honest=3, variants=2)
TWO_ADAPTERS = Scenario("two configurations for one attempt, n = 4", (FOUR, replace(FOUR, adapter="other")), honest=3)
TWO_ATTEMPTS = Scenario("two attempts, n = 4, losses at U3", (FOUR, AGAIN), honest=3, restarts=False, losses=(3,))
THREE_SERVED = Scenario(
    "two attempts, then a second round, n = 3", (THREE, replace(THREE, attempt=1), replace(THREE, round=2)), honest=2
)
TWO_JOBS = Scenario(
    "two attempts, and another job, n = 3", (THREE, replace(THREE, attempt=1), OTHER_JOB), honest=2, restarts=False
)
OVERLAP = Scenario(
    "two attempts with overlapping cohorts, n = 4 of 5",
    OVERLAPPING,
    honest=4,
    crashes=False,
    restarts=False,
    losses=(1,),
)
FIVE_DEVICES = Scenario("one attempt, n = 5", (FIVE,), honest=4, restarts=False)

FAST = (ONE_ATTEMPT, TWO_ADAPTERS, FIVE_DEVICES, TWO_ATTEMPTS, THREE_SERVED, TWO_JOBS, OVERLAP)
SLOW = (
    replace(TWO_ATTEMPTS, name="two attempts, n = 4, losses at U2 and U3", crashes=False, losses=(2, 3)),
    replace(TWO_JOBS, name="two attempts, and another job, n = 3, any restarts", restarts=True),
    replace(OVERLAP, name="two attempts with overlapping cohorts, n = 4 of 5, losses at U1 and U3", losses=(1, 3)),
    replace(FIVE_DEVICES, name="one attempt, n = 5, any restarts", restarts=True),
)

_ONE = replace(ONE_ATTEMPT, variants=1, restarts=False)
_BRIEF = replace(TWO_ATTEMPTS, crashes=False, losses=(1,))
_ALONE = replace(FOUR, threshold=1)
_MINORITY = replace(FOUR, quorum=2)
_NO_FLOOR = Config(1, 0, cohort=0b11111, threshold=3, quorum=3, minimum=3)
_WANTS_ALL = replace(FOUR, minimum=4)

MUTANTS = (
    Mutant("votes twice", Rules(votes_once=False), _ONE, "one survivor set"),
    Mutant("takes any quorum", Rules(checks_quorum=False), replace(_ONE, configs=(_MINORITY,)), "one survivor set"),
    Mutant(
        "takes any threshold",
        Rules(checks_threshold=False),
        replace(_ONE, configs=(_ALONE,), promises=("dropouts hidden",)),
        "dropouts hidden",
    ),
    Mutant(
        "expects no colluder in a small cohort",
        Rules(floor=False),
        replace(_ONE, configs=(_NO_FLOOR,), honest=4, losses=(3,), promises=("dropouts hidden",)),
        "dropouts hidden",
    ),
    Mutant(
        "does not count survivors",
        Rules(counts_survivors=False),
        replace(_ONE, configs=(_WANTS_ALL,)),
        "enough survivors",
    ),
    Mutant("reveals b of a dropout", Rules(reveals_one_kind=False), _ONE, "dropouts hidden"),
    Mutant("binds nothing to the configuration", Rules(binds_config=False), TWO_ADAPTERS, "same configuration"),
    Mutant("keeps no log", Rules(keeps_log=False), replace(_ONE, sessions=2), "served once"),
    Mutant("answers before it writes its log", Rules(log_first=False), replace(_BRIEF, crashes=True), "served once"),
    Mutant("does not close a round that it has masked", Rules(closes_round=False), _BRIEF, "served once"),
    Mutant(
        "does not close a round that it has masked, and what that costs",
        Rules(closes_round=False),
        replace(OVERLAP, promises=("summed once",)),
        "summed once",
    ),
    Mutant(
        "keeps its log by a job's name",
        Rules(log_by_digest=False),
        replace(_BRIEF, configs=(FOUR, RENAMED), promises=("summed once",)),
        "summed once",
    ),
    Mutant(
        "keeps two sessions open",
        Rules(one_session=False),
        replace(_BRIEF, promises=("combinations",)),
        "combinations",
    ),
    Mutant(
        "adds what is left of the last round", Rules(forgets=False), replace(_BRIEF, configs=(FOUR, NEXT)), "no memory"
    ),
)

TOO_MANY = replace(_ONE, name="two colluders of four", honest=2)
"""One more than a cohort of four stands."""
