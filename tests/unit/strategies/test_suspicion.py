"""Grouping and suspicion: cohorts are cut evenly, and who makes sums fail is found by how they are cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_fixture import BASE, LAYOUT

from fedtune.core.job.job_file import load_job
from fedtune.core.job.secure_cohorts import most_groups, secure_cohort_problems
from fedtune.core.job.settings import Job
from fedtune.core.round_records import ClientRecord
from fedtune.core.secagg import Roster
from fedtune.strategies.assembly import Clients, assemble
from fedtune.strategies.cohorts.grouping import cut_cohort
from fedtune.strategies.cohorts.suspicion import UNSUSPECTED, Circle, GroupOutcome, Suspicion
from fedtune.strategies.federation import initial_state
from fedtune.strategies.requests import plan_round
from fedtune.strategies.secure_sum import SecureAggregation

Fails = Callable[[tuple[str, ...]], bool]


def job(groups: int = 1, *overrides: str) -> Job:
    return load_job(None, ["federation.clients_per_round=1.0", f"secure_aggregation.groups={groups}", *overrides])


def named(count: int) -> list[str]:
    return [f"{index:03d}" for index in range(count)]


def outcome(members: Sequence[str], failed: bool) -> GroupOutcome:
    everyone = frozenset(members)
    return (
        GroupOutcome(tuple(members), reason="unfit", suspects=everyone)
        if failed
        else GroupOutcome(tuple(members), everyone)
    )


def after_rounds(grouped: Job, names: Sequence[str], fails: Fails, rounds: int) -> list[Suspicion]:
    """Returns the suspicion after each of some rounds, in which the groups for which fails(group) is true fail."""
    suspicions = [UNSUSPECTED]
    for number in range(1, rounds + 1):
        cohort = [name for name in names if name not in suspicions[-1].excluded]
        groups = cut_cohort(grouped, number, cohort, suspicions[-1]).groups
        suspicions.append(suspicions[-1].after([outcome(group, fails(group)) for group in groups]))
    return suspicions[1:]


@given(st.integers(3, 120), st.integers(1, 12), st.integers(1, 9), st.sets(st.integers(0, 119), max_size=40))
def test_groups_are_a_partition_of_nearly_equal_size_with_as_many_suspects_each(
    count: int, wanted: int, number: int, suspected: set[int]
) -> None:
    names = named(count)
    suspects = frozenset(names[index] for index in suspected if index < count)
    suspicion = Suspicion((Circle(suspects),)) if suspects else UNSUSPECTED
    cut = cut_cohort(job(wanted), number, names, suspicion).groups
    assert sorted(name for group in cut for name in group) == names
    assert len(cut) == most_groups(job(), count, max(wanted, 2 if suspects else 1))
    for counts in ([len(group) for group in cut], [len(suspects & set(group)) for group in cut]):
        assert max(counts) - min(counts) <= 1
    assert len(cut) == 1 or not any(secure_cohort_problems(job(), len(group)) for group in cut)
    assert cut == cut_cohort(job(wanted), number, names, suspicion).groups


def test_groups_differ_from_round_to_round_and_one_group_is_the_cohort_in_its_order() -> None:
    names = named(30)
    cuts = {cut_cohort(job(5), number, names, UNSUSPECTED).groups for number in range(1, 9)}
    assert len(cuts) == 8
    assert cut_cohort(job(), 1, ["b", "a", "c"], UNSUSPECTED).groups == (("b", "a", "c"),)


def test_too_few_clients_are_cut_into_fewer_groups_and_the_record_says_so() -> None:
    cut = cut_cohort(job(5), 1, named(11), UNSUSPECTED)
    assert [len(group) for group in cut.groups] == [4, 4, 3]
    assert cut.notes == ("cut into 3 of 5 groups: 11 clients are too few for more",)
    assert not cut_cohort(job(5), 1, named(15), UNSUSPECTED).notes


@pytest.mark.parametrize(("count", "tiers", "reason"), [(5, 1, "too few for two groups"), (30, 2, "several tiers")])
def test_a_cohort_that_cannot_be_cut_leaves_suspects_together_and_says_why(count: int, tiers: int, reason: str) -> None:
    names = named(count)
    cut = cut_cohort(job(), 2, names, Suspicion((Circle(frozenset(names)),)), tiers=tiers)
    assert cut.groups == (tuple(names),)
    assert reason in cut.notes[-1]


@settings(deadline=None)
@given(st.integers(6, 200), st.integers(1, 8), st.data())
def test_a_device_that_makes_every_sum_fail_is_the_only_suspect_within_log_rounds_and_excluded_in_the_next(
    count: int, groups: int, data: st.DataObject
) -> None:
    names = named(count)
    culprit = names[data.draw(st.integers(0, count - 1))]
    bound = ceil(log2(count)) + 1
    history = after_rounds(job(groups), names, lambda group: culprit in group, bound + 1)
    assert all(culprit in suspicion.suspects or suspicion.excluded == (culprit,) for suspicion in history)
    assert history[bound - 1].suspects <= {culprit}, "it is found"
    assert history[bound].excluded == (culprit,)
    assert not history[bound].circles


@settings(deadline=None)
@given(st.integers(20, 60), st.integers(1, 6), st.sets(st.integers(0, 19), min_size=2, max_size=3))
def test_several_such_devices_are_found_one_after_another_and_no_other_is_excluded(
    count: int, groups: int, hostile: set[int]
) -> None:
    names = named(count)
    culprits = {names[index] for index in hostile}
    history = after_rounds(job(groups), names, lambda group: bool(culprits & set(group)), 60)
    assert set(history[-1].excluded) == culprits
    assert not history[-1].circles


def test_a_device_that_makes_one_sum_fail_is_cleared_by_the_next_that_it_is_in() -> None:
    first = UNSUSPECTED.after([outcome(named(10), failed=True)])
    assert first.suspects == set(named(10))
    assert first.after([outcome(named(5), failed=False), outcome(named(10)[5:], failed=False)]) == UNSUSPECTED


def test_suspects_that_are_not_in_a_round_remain_suspects() -> None:
    suspicion = Suspicion((Circle(frozenset("ab")),))
    assert suspicion.after([outcome("cd", failed=False)]) == suspicion
    assert suspicion.after([outcome("ac", failed=False)]).suspects == {"b"}


def test_a_second_hostile_device_cannot_put_its_own_failures_on_the_last_suspect_twice() -> None:
    names = named(12)
    last = Suspicion((Circle(frozenset({"000"}), frozenset(names[1:6])),))
    for number in range(1, 20):
        (group,) = [group for group in cut_cohort(job(), number, names, last).groups if "000" in group]
        assert not set(group) & set(names[1:6])
    framed = last.after([outcome(names[1:6], failed=True), outcome(("000", *names[6:]), failed=False)])
    assert not framed.excluded
    assert framed.suspects == set(names[1:6])


def test_a_round_in_several_groups_waits_for_all_clients_since_each_group_needs_its_own_answers() -> None:
    names, timed = named(20), job(1, "federation.selection=deadline", "federation.clients_per_round=10")
    seconds = Clients(len(names), seconds=dict.fromkeys(names, 2.0))
    federation = assemble(timed, BASE, LAYOUT, seconds, secure=SecureAggregation(Roster({})))
    learned = federation.selection.learned(1, [ClientRecord(name, answered=2.5) for name in names[:3]])
    federation, state = replace(federation, selection=learned), initial_state(federation)
    assert plan_round(federation, state, names).closing is not None
    suspicion = Suspicion((Circle(frozenset(names)),), ("019",))
    plan = plan_round(federation, replace(state, suspicion=suspicion), names)
    assert len(plan.grouping.groups) == 2
    assert plan.closing is None
    assert "019" not in plan.tiers, "it is left out"


def test_suspicion_comes_back_from_json_and_says_what_is_new() -> None:
    before = Suspicion((Circle(frozenset("a"), frozenset("bc")), Circle(frozenset("xy"))), ("z",))
    assert Suspicion.from_json(json.loads(json.dumps(before.to_json()))) == before
    after = before.after([outcome("abc", failed=True), outcome("xk", failed=False)])
    assert after.excluded == ("z", "a")
    told = after.notes(before)
    assert "a is left out from now on" in told[0]
    assert told[1:] == ("suspects of a failed sum, 1: y",)
