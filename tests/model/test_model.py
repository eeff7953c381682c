"""The model of secure aggregation keeps every promise in all its states, and breaks one without any of its rules."""

from __future__ import annotations

import pytest
from secagg_model.devices import Device, Rules, answer
from secagg_model.knowledge import can_make
from secagg_model.promises import PROMISES, Situation, broken, smallest_support
from secagg_model.scenarios import FAST, MUTANTS, SLOW, TOO_MANY, Mutant
from secagg_model.search import Scenario, search


@pytest.mark.parametrize("scenario", FAST, ids=lambda scenario: scenario.name)
def test_every_promise_holds_in_every_state(scenario: Scenario) -> None:
    result = search(scenario)
    assert result.broken == [], result.trace
    assert result.opened, "a bound within which no sum ever opens shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SLOW, ids=lambda scenario: scenario.name)
def test_every_promise_holds_within_larger_bounds(scenario: Scenario) -> None:
    assert search(scenario).broken == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_without_a_rule_a_promise_breaks_and_the_steps_to_it_can_be_taken(mutant: Mutant) -> None:
    result = search(mutant.scenario, mutant.rules)
    assert mutant.breaks in result.broken
    configs, world = mutant.scenario.configs, (Device(),) * mutant.scenario.honest
    for number, message in result.trace:
        assert broken(Situation(mutant.rules, configs, world), {mutant.breaks: PROMISES[mutant.breaks]}) == []
        assert can_make(mutant.rules, configs, world, number, message)
        after = answer(mutant.rules, configs, number, world[number], message)
        assert after is not None
        world = (*world[:number], after, *world[number + 1 :])
    assert mutant.breaks in broken(Situation(mutant.rules, configs, world))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_with_all_rules_the_bounds_of_a_mutant_break_nothing(mutant: Mutant) -> None:
    assert search(mutant.scenario, Rules()).broken == []


def test_with_more_colluders_than_assumed_two_survivor_sets_find_a_quorum() -> None:
    assert "one survivor set" in search(TOO_MANY).broken


@pytest.mark.parametrize(
    ("sums", "fewest"),
    [
        ([], float("inf")),
        (["abc"], 3),
        (["abc", "de"], 2),
        (["abcd", "bcd"], 1),
        (["abc", "bcd"], 2),
        (["abc", "bcd", "ad"], 1),
    ],
)
def test_the_smallest_combination_of_sums_is_found(sums: list[str], fewest: float) -> None:
    assert smallest_support([set(each) for each in sums]) == fewest
