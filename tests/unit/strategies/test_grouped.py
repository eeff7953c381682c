"""The aggregation over groups: the mean over all their clients, or a rule that one group does not steer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from secure_fixture import LAYOUT

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec.update_forms import RING, RingTotal
from fedtune.core.codec.uplink import FactorTerms, factor_terms
from fedtune.core.errors import PeerError
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.protocol.messages import Uplink
from fedtune.strategies.aggregation import (
    CoordinateMedian,
    Frame,
    Grouped,
    GroupSum,
    Mean,
    RingMean,
    Robust,
    TrimmedMean,
)

METHOD = AGGREGATIONS["fedavg"]
RING_MEAN = RingMean(METHOD)
TERMS = factor_terms(Uplink("ring", 8, 1.0, False, 4, (1.0, 1.0), True), LAYOUT, "ab", 5, 1)
FRAME = Frame(LAYOUT, "ab", LAYOUT.initial(0), terms=TERMS)
MEAN = Grouped(RING_MEAN, Mean(METHOD))


def summed(clients: list[Vector]) -> GroupSum:
    """Returns a group's sum."""
    return GroupSum(tuple(f"{index:02d}" for index in range(len(clients))), totals_of(clients))


def totals_of(clients: list[Vector]) -> dict[FactorTerms, RingTotal]:
    totals: dict[FactorTerms, RingTotal] = {}
    for seed, update in enumerate(clients):
        for each, half in zip(TERMS, LAYOUT.parts(update), strict=True):
            total = RingTotal(RING.contribute(half, each, seed), 1)
            totals[each] = RING.join(totals[each], total, each) if each in totals else total
    return totals


def updates(count: int, seed: int = 0) -> list[Vector]:
    random = np.random.default_rng(seed)
    common = random.standard_normal(LAYOUT.size)
    return [(0.02 * (common + 0.1 * random.standard_normal(LAYOUT.size))).astype(np.float32) for _ in range(count)]


def aggregate(aggregator: Grouped, groups: list[list[Vector]]) -> Any:
    aggregation = aggregator.begin(FRAME)
    for group in groups:
        aggregation.add(summed(group))
    return aggregation.finish()


def test_one_group_gives_the_bits_of_its_sum_whatever_would_go_across_groups() -> None:
    group = updates(4)
    alone = RING_MEAN.begin(FRAME)
    alone.add(totals_of(group))
    expected = alone.finish()
    for across in (Mean(METHOD), Robust(METHOD, CoordinateMedian())):
        found = aggregate(Grouped(RING_MEAN, across), [group])
        assert found.update.tobytes() == expected.update.tobytes()
        assert found.clips == expected.clips


def test_the_mean_over_groups_is_the_mean_over_their_clients() -> None:
    clients = updates(9)
    found = aggregate(MEAN, [clients[:4], clients[4:7], clients[7:]])
    np.testing.assert_allclose(found.update, np.mean(clients, axis=0), atol=2e-3)


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(0.2)])
def test_a_rule_over_groups_does_with_one_group_what_it_does_with_one_update(rule: Any) -> None:
    clients = updates(20)
    groups = [clients[place : place + 4] for place in range(0, 20, 4)]
    poisoned = [[-5 * update for update in groups[0]], *groups[1:]]
    aggregator = Grouped(RING_MEAN, Robust(METHOD, rule))
    honest, steered = (aggregate(aggregator, each) for each in (groups, poisoned))
    plain = aggregate(MEAN, poisoned)
    honest_norm = np.linalg.norm(honest.update)
    assert np.linalg.norm(steered.update - honest.update) < 0.2 * honest_norm
    assert np.linalg.norm(plain.update - honest.update) > honest_norm
    assert steered.clips["b"] < 1.2 * honest.clips["b"], "a group's norm opens no clip"


def test_groups_merge_and_none_gives_no_change() -> None:
    clients = updates(8)
    left, right = MEAN.begin(FRAME), MEAN.begin(FRAME)
    left.add(summed(clients[:4]))
    right.add(summed(clients[4:]))
    left.merge(right)
    assert left.finish().update.tobytes() == aggregate(MEAN, [clients[:4], clients[4:]]).update.tobytes()
    assert not MEAN.begin(FRAME).finish().update.any()


def test_a_group_that_is_no_sum_is_refused_and_the_others_stay() -> None:
    clients = updates(8)
    aggregation = MEAN.begin(FRAME)
    aggregation.add(summed(clients[:4]))
    false = totals_of(clients[4:])
    first = next(iter(false))
    false[first] = RingTotal(false[first].total, 1)
    with pytest.raises(PeerError, match="a sum of 1 contribution"):
        aggregation.add(GroupSum(("a", "b", "c", "d"), false))
    assert aggregation.finish().update.tobytes() == aggregate(MEAN, [clients[:4]]).update.tobytes()


def test_a_rule_over_groups_works_under_masks_and_asks_for_equal_ranks() -> None:
    method = Grouped(RING_MEAN, Robust(METHOD, CoordinateMedian())).method
    assert method.works_under_masks
    assert method.equal_ranks
