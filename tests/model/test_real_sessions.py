"""The model cannot drift from the code: real client sessions answer what its devices answer, and refuse the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from secagg_model.devices import Rules
from secagg_model.lockstep import Lockstep
from secagg_model.scenarios import FOUR, ONE_ATTEMPT, OTHER_JOB, THREE, TWO_ATTEMPTS
from secagg_model.search import Scenario, search

ONE = replace(ONE_ATTEMPT, variants=1, restarts=False)
WEAK = replace(ONE, configs=(FOUR, replace(FOUR, threshold=2), replace(FOUR, quorum=2), replace(FOUR, minimum=2)))
MARKS = (THREE, replace(THREE, attempt=1), replace(THREE, round=2))
SERVED = Scenario("all marks", MARKS, honest=2, restarts=False, losses=())
JOBS = replace(SERVED, configs=(THREE, OTHER_JOB))
ATTEMPTS = replace(TWO_ATTEMPTS, losses=(1,), crashes=True, restarts=False)


@pytest.mark.parametrize("scenario", [WEAK, SERVED, JOBS], ids=["one attempt", "rounds", "jobs"])
def test_real_sessions_answer_exactly_what_the_model_answers(scenario: Scenario) -> None:
    lockstep = Lockstep(scenario)
    result = search(scenario, visit=lockstep.visit)
    assert result.broken == []
    assert result.opened
    assert lockstep.tried > result.states


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [ATTEMPTS, replace(ONE, restarts=True)], ids=["two attempts", "restarts"])
def test_real_sessions_answer_what_the_model_answers_within_larger_bounds(scenario: Scenario) -> None:
    assert search(scenario, visit=Lockstep(scenario).visit).broken == []


@pytest.mark.parametrize(
    "rule",
    ["votes_once", "checks_quorum", "checks_threshold", "counts_survivors", "keeps_log", "log_first", "closes_round"],
)
def test_a_model_that_follows_other_rules_than_the_code_is_found_out(rule: str) -> None:
    rules = Rules(**{rule: False})
    configs = (*WEAK.configs, replace(FOUR, attempt=1, minimum=4))
    scenario = replace(WEAK, configs=configs, losses=(3,), promises=())
    with pytest.raises(AssertionError, match="device "):
        search(scenario, rules, Lockstep(scenario, rules).visit)
