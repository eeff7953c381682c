"""Group testing: clients that make their groups stand apart are found, and never more than may be hostile."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_fixture import LAYOUT

from fedtune.core.adapter.layout import Vector
from fedtune.core.job.job_file import load_job
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.strategies.aggregation import Aggregate, Frame, GroupTesting, Mean, Update, update_aggregator
from fedtune.strategies.aggregation.evidence import (
    CONDEMNING,
    FEWEST_TESTS,
    KEPT_TESTS,
    NO_EVIDENCE,
    Evidence,
    GroupTest,
    distances,
)
from fedtune.strategies.aggregation.group_testing import APART, scored

METHOD = AGGREGATIONS["fedavg"]
NAMES = [f"{index:02d}" for index in range(40)]
HOSTILE = frozenset(NAMES[::5])
SHARE = 0.2
FRAME = Frame(LAYOUT, "a", LAYOUT.initial(0))
Groups = list[tuple[str, ...]]


def drawn(names: list[str], number: int, size: int = 3) -> Groups:
    """Returns a round's groups."""
    order = np.random.default_rng(number).permutation(names).tolist()
    count = len(names) // size
    return [tuple(sorted(order[place::count])) for place in range(count)]


def outcome_of(groups: Groups, number: int, hostile: Collection[str]) -> GroupTest:
    """Returns scores that grow with the hostile clients of a group, on a side that is drawn for each round."""
    random = np.random.default_rng((1, number))
    scores = np.array([len(set(hostile) & set(group)) for group in groups]) + 0.1 * random.standard_normal(len(groups))
    scores = random.choice([-1.0, 1.0]) * (scores - scores.mean())
    return GroupTest(tuple(groups), tuple(scores.tolist()))


def after_rounds(count: int) -> Evidence:
    evidence = NO_EVIDENCE
    for number in range(count):
        names = [name for name in NAMES if name not in evidence.condemned]
        evidence = evidence.after(outcome_of(drawn(names, number), number, HOSTILE), SHARE)
    return evidence


def test_a_fifth_of_hostile_clients_is_found_within_rounds_and_no_honest_client_is_condemned() -> None:
    assert not after_rounds(FEWEST_TESTS - 1).condemned, "too few tests of anyone"
    assert set(after_rounds(8).condemned) == HOSTILE


def test_the_side_of_a_rounds_scores_tells_nothing() -> None:
    tests = [outcome_of(drawn(NAMES, number), number, HOSTILE) for number in range(6)]
    turned = [replace(test, scores=tuple(-score for score in test.scores)) for test in tests]
    expected = distances(tests)
    assert min(expected[name] for name in HOSTILE) > max(expected[name] for name in NAMES if name not in HOSTILE)
    for mixed in (turned, [*turned[:3], *tests[3:]], [tests[0], *turned[1:]]):
        assert distances(mixed) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([0.05, 0.1, 0.2, 0.4]))
def test_whatever_the_scores_no_more_clients_are_condemned_than_may_be_hostile(
    seed: int, heavy: int, share: float
) -> None:
    evidence = NO_EVIDENCE
    for number in range(6):
        random = np.random.default_rng((seed, number))
        groups = drawn(NAMES, seed + number)
        scores = random.standard_normal(len(groups)) + 20.0 * np.array([NAMES[heavy - 1] in each for each in groups])
        scores += 10.0 * np.array([len(set(NAMES[:heavy]) & set(each)) for each in groups])
        evidence = evidence.after(GroupTest(tuple(groups), tuple(scores.tolist())), share)
        assert len(evidence.condemned) <= share * len(NAMES)


def test_a_client_is_condemned_after_enough_tests_of_its_own() -> None:
    late = "late"
    evidence = NO_EVIDENCE
    for number in range(12):
        names = [*NAMES, late] if number >= 12 - FEWEST_TESTS else NAMES
        before, evidence = evidence, evidence.after(outcome_of(drawn(names, number), number, frozenset({late})), SHARE)
    assert before.distance[late] > CONDEMNING
    assert late not in before.condemned
    assert evidence.condemned[0] == late


def test_a_verdict_is_taken_back_when_later_tests_speak_against_it_and_the_notes_say_so() -> None:
    framed = frozenset({"07"})
    evidence = NO_EVIDENCE
    for number in range(4):
        evidence = evidence.after(outcome_of(drawn(NAMES, number), number, framed), SHARE)
    assert evidence.condemned == ("07",)
    assert evidence.notes(NO_EVIDENCE) == ("07 is left out: the groups that it was in stand apart from the others",)
    before = evidence
    for number in range(4, 30):  # as if it still took part
        evidence = evidence.after(outcome_of(drawn(NAMES, number), number, HOSTILE), SHARE)
    assert "07" not in evidence.condemned
    assert "07 may take part again: the rounds since speak for it" in evidence.notes(before)


def test_evidence_comes_back_from_a_checkpoint_and_goes_on_bit_for_bit() -> None:
    evidence = after_rounds(5)
    restored = Evidence.from_json(json.loads(json.dumps(evidence.to_json())))
    assert restored == evidence
    test = outcome_of(drawn(NAMES, 5), 5, HOSTILE)
    assert restored.after(test, SHARE) == evidence.after(test, SHARE)


def test_old_tests_are_forgotten() -> None:
    evidence = NO_EVIDENCE
    for number in range(KEPT_TESTS + 2):
        evidence = evidence.after(outcome_of(drawn(NAMES[:6], number), number, HOSTILE), SHARE)
    assert len(evidence.tests) == KEPT_TESTS


def updates(number: int, push: float = 0.0) -> dict[str, Vector]:
    """Returns every client's update: honest ones agree a little; hostile ones push one way, if at all."""
    random = np.random.default_rng((2, number))
    shared, direction = random.standard_normal((2, FRAME.size))
    return {
        name: (
            0.01 * (push * direction if push and name in HOSTILE else 0.4 * shared + random.standard_normal(FRAME.size))
        ).astype(np.float32)
        for name in NAMES
    }


def means(groups: Groups, of: dict[str, Vector]) -> list[Update]:
    return [Update(np.mean([of[name] for name in group], axis=0), len(group), clients=group) for group in groups]


def aggregate(groups: list[Update], frame: Frame = FRAME) -> Aggregate:
    aggregation, other = GroupTesting(Mean(METHOD), SHARE).begin(frame), GroupTesting(Mean(METHOD), SHARE).begin(frame)
    for group in groups[::2]:
        aggregation.add(group)
    for group in groups[1::2]:
        other.add(group)
    aggregation.merge(other)
    return aggregation.finish()


def test_scores_stand_apart_where_some_push_one_way_and_not_among_honest_groups_in_many_dimensions() -> None:
    random = np.random.default_rng(0)
    honest = (0.3 + random.standard_normal((13, 4000))).astype(np.float32)
    assert sum(score**2 for score in scored(honest)) < 1.5
    pushing = np.array([0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 1, 0, 0])
    pushed = honest + (pushing[:, None] * random.standard_normal(4000)).astype(np.float32)
    assert sum(score**2 for score in scored(pushed)) > APART
    assert abs(np.corrcoef(scored(pushed), pushing)[0, 1]) > 0.98
    assert not any(scored(np.ones((4, 10), dtype=np.float32))), "groups that are all alike"


def test_groups_with_hostile_clients_are_left_out_of_the_mean_and_the_order_of_arrival_tells_nothing() -> None:
    groups = drawn(NAMES, 4)
    of = updates(0, push=4.0)
    honest = np.mean([of[name] for name in NAMES if name not in HOSTILE], axis=0)
    found = aggregate(means(groups, of))
    assert found.evidence is not None
    assert len(found.evidence.tests) == 1
    poisoned = np.mean([group.values for group in means(groups, of)], axis=0)
    assert np.linalg.norm(found.update - honest) < np.linalg.norm(poisoned - honest) / 4
    again = aggregate(means(groups, of)[::-1])
    assert again.update.tobytes() == found.update.tobytes()
    assert again.evidence == found.evidence


@pytest.mark.parametrize(("push", "left_out"), [(1.05, False), (2.0, True)])
def test_groups_that_hardly_stand_apart_are_evidence_and_stay_in_the_mean(push: float, left_out: bool) -> None:
    groups = drawn(NAMES[:39], 0)
    values = np.eye(len(groups), FRAME.size, dtype=np.float32)
    values[:2, -1] = push
    assert (sum(score**2 for score in scored(values)) > APART) is left_out
    found = aggregate([Update(each, 3, clients=group) for each, group in zip(values, groups, strict=True)])
    assert found.evidence is not None
    assert len(found.evidence.tests) == 1
    assert (float(found.update[-1]) == 0) is left_out


def test_groups_of_doubted_clients_are_left_out_in_every_round_and_not_if_all_are() -> None:
    kept = after_rounds(FEWEST_TESTS)
    doubted = set(kept.doubted) - set(kept.condemned)
    assert doubted
    assert doubted <= HOSTILE
    groups = drawn([name for name in NAMES if name not in kept.condemned], 4)
    values = np.eye(len(groups), FRAME.size, dtype=np.float32)
    found = aggregate(
        [Update(each, len(group), clients=group) for each, group in zip(values, groups, strict=True)],
        replace(FRAME, evidence=kept),
    )
    assert found.evidence is not None
    assert found.evidence.doubted
    stay = [not set(found.evidence.doubted) & set(group) for group in groups]
    assert (found.update[: len(groups)] > 0).tolist() == stay
    alike = [replace(each, values=values[0]) for each in means(groups[:2], updates(0))]
    assert aggregate(alike).update[0] == pytest.approx(1.0)
    assert aggregate([]).evidence == NO_EVIDENCE


def test_a_job_names_it() -> None:
    groups = ["federation.clients_per_round=40", "secure_aggregation.groups=13", "federation.robust=group-testing"]
    job = load_job(None, groups)
    assert update_aggregator(job.federation) == GroupTesting(Mean(METHOD), 0.2)
    assert GroupTesting(Mean(METHOD), 0.2).method.equal_ranks
