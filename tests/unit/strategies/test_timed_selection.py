"""Cohorts by time and utility, and the virtual clock: slow clients cost little, and false claims gain nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fedtune.core.round_records import ClientRecord
from fedtune.core.round_timing import over_selected, round_deadline, run_clock, staleness_weight, work_share
from fedtune.strategies.cohorts.timed_selection import DeadlineSelection, Observation, UtilitySelection, bounded_seconds

FAST = {f"fast-{index:02d}": 1.0 for index in range(45)}
SLOW = {f"slow-{index:02d}": 4.0 for index in range(5)}
HOPELESS = {"hopeless": 1000.0}
SECONDS = FAST | SLOW | HOPELESS


def test_the_deadline_is_13_tenths_of_the_80th_percentile() -> None:
    times = [float(value) for value in range(1, 12)]
    assert round_deadline(times) == pytest.approx(1.3 * 9.0)
    for bad in ([], [1.0, math.nan], [0.0], [math.inf]):
        with pytest.raises(ValueError, match="a deadline needs"):
            round_deadline(bad)


def test_slow_clients_do_what_they_can_and_hopeless_ones_nothing() -> None:
    assert work_share(5.0, 10.0) == 1.0
    assert work_share(20.0, 10.0) == pytest.approx(0.45)
    assert 20.0 * work_share(20.0, 10.0) < 10.0
    assert work_share(1000.0, 10.0) == 0.0


def test_a_round_closes_with_the_last_wanted_arrival() -> None:
    course = run_clock({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0}, wanted=3, deadline=5.0)
    assert (course.arrived, course.late, course.seconds) == (("b", "c", "a"), ("d",), 3.0)


def test_a_round_closes_at_the_deadline_where_too_few_arrive() -> None:
    course = run_clock({"a": 3.0, "b": None, "c": 9.0}, wanted=3, deadline=5.0)
    assert (course.arrived, course.late, course.seconds) == (("a",), ("b", "c"), 5.0)


def test_without_a_deadline_the_slowest_decides() -> None:
    course = run_clock({"a": 3.0, "b": None, "c": 90.0}, wanted=3, deadline=None)
    assert (course.arrived, course.seconds) == (("a", "c"), 90.0)
    assert run_clock({"a": None}, wanted=1, deadline=None).seconds == 0.0


def test_a_late_update_weighs_less() -> None:
    assert [staleness_weight(late) for late in (0, 3)] == [1.0, 0.5]
    with pytest.raises(ValueError, match="rounds ahead"):
        staleness_weight(-1)


def test_more_are_asked_than_are_wanted() -> None:
    selection = DeadlineSelection(10, 0, SECONDS)
    assert len(selection.cohort(1, list(SECONDS))) == over_selected(10, 51) == 13
    assert selection.cohort(1, list(SECONDS)) == selection.cohort(1, list(SECONDS)[::-1])
    assert selection.cohort(1, list(SECONDS)) != selection.cohort(2, list(SECONDS))
    assert selection.cohort(1, ["fast-00"]) == ["fast-00"]


def test_slow_tiers_take_part_as_often_as_others_and_the_hopeless_never() -> None:
    selection = DeadlineSelection(10, 0, SECONDS)
    asked = Counter(name for number in range(400) for name in selection.cohort(number, list(SECONDS)))
    assert asked["hopeless"] == 0
    slow, fast = (np.mean([asked[name] for name in names]) for names in (SLOW, FAST))
    assert 0.85 < slow / fast < 1.15


def test_where_nobody_is_known_everybody_may_be_asked() -> None:
    names = [f"new-{index}" for index in range(5)]
    assert DeadlineSelection(5, 0, {}).cohort(1, names) == names


@pytest.mark.parametrize("claim", [0.0, -5.0, math.nan, math.inf, 1e30])
def test_absurd_times_are_bounded(claim: float) -> None:
    assert 1e-3 <= bounded_seconds(claim) <= 86_400
    seconds = SECONDS | {"liar": claim}
    assert DeadlineSelection(10, 0, seconds).cohort(1, list(seconds))
    assert UtilitySelection(10, 0, seconds).cohort(1, list(seconds))


def seen(**losses: float) -> dict[str, Observation]:
    return {name.replace("_", "-"): Observation(1, loss, 100) for name, loss in losses.items()}


def shares(selection: UtilitySelection, names: list[str], rounds: int = 600) -> dict[str, float]:
    asked = Counter(name for number in range(2, rounds) for name in selection.cohort(number, names))
    return {name: asked[name] / rounds for name in names}


def all_seen(seconds: dict[str, float], loss: float = 1.0) -> dict[str, Observation]:
    return {name: Observation(1, loss, 100) for name in seconds}


def test_a_higher_loss_is_asked_more_often_and_a_slow_client_less() -> None:
    known = all_seen(SECONDS)
    for index in range(20):
        known[f"fast-{index:02d}"] = Observation(1, 4.0, 100)
    selection = UtilitySelection(5, 0, SECONDS, seen=known)
    asked = shares(selection, list(SECONDS))
    useful, plain = (
        np.mean([asked[f"fast-{i:02d}"] for i in range(20)]),
        np.mean([asked[f"fast-{i:02d}"] for i in range(20, 45)]),
    )
    slow = np.mean([asked[name] for name in SLOW])
    assert useful > 1.4 * plain  # clients that were not asked for long have a bonus too
    assert slow < 0.5 * plain
    assert slow > 0


def test_under_secure_aggregation_losses_are_not_looked_at() -> None:
    known = all_seen(SECONDS)
    told = known | {name: Observation(1, 20.0, 1024) for name in list(FAST)[:10]}
    for number in range(2, 20):
        cohorts = [
            UtilitySelection(5, 0, SECONDS, hidden=True, seen=what).cohort(number, list(SECONDS))
            for what in (known, told)
        ]
        assert cohorts[0] == cohorts[1]


def test_an_absurd_loss_or_count_buys_no_more_than_the_95th_percentile() -> None:
    known = all_seen(FAST)
    liar = ClientRecord("fast-07", loss=1e6, examples=1 << 40)
    selection = UtilitySelection(5, 0, FAST, seen=known).learned(1, [liar])
    asked = shares(selection, list(FAST))
    others = np.mean([share for name, share in asked.items() if name != "fast-07"])
    assert asked["fast-07"] < 1.5 * others


def test_who_was_dropped_teaches_nothing_and_a_selection_is_never_changed() -> None:
    selection = UtilitySelection(5, 0, FAST)
    records = [
        ClientRecord("fast-00", loss=2.0, examples=10),
        ClientRecord("fast-01", loss=2.0, examples=10, dropped="x"),
    ]
    after = selection.learned(3, records)
    assert after.seen == {"fast-00": Observation(3, 2.0, 10)}
    assert selection.seen == {}
    assert after == replace(selection, seen=after.seen)


def test_the_unseen_are_explored_first_and_never_forgotten() -> None:
    names = list(FAST)
    selection = UtilitySelection(10, 0, FAST, seen=all_seen(dict.fromkeys(names[:30], 1.0)))
    early = len(set(selection.cohort(1, names)) - set(names[:30]))
    late = np.mean([len(set(selection.cohort(number, names)) - set(names[:30])) for number in range(200, 300)])
    assert early >= 11
    assert 2 <= late <= 4
    assert len(UtilitySelection(10, 0, FAST).cohort(1, names)) == 13
