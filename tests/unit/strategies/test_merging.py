"""Merged aggregations of parts of a cohort equal the aggregation of the whole, as hierarchical aggregation requires."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.adapter.tiers import rank_slices
from fedtune.core.codec.update_forms import FORMS
from fedtune.core.codec.uplink import factor_terms
from fedtune.core.errors import UpdateError
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.protocol.messages import Uplink
from fedtune.strategies.aggregation import (
    Clipped,
    CoordinateMedian,
    Decoded,
    Frame,
    Mean,
    ProductMean,
    RingMean,
    Robust,
    Unpacked,
    Update,
)
from fedtune.strategies.aggregation.aggregator import Payloads
from fedtune.strategies.aggregation.mean import MAX_WEIGHT

LAYOUT = LoraLayout((AdaptedModule("q", 6, 5), AdaptedModule("v", 5, 7)), rank=4, alpha=2.0)
FEDAVG = AGGREGATIONS["fedavg"]
FRAME = Frame(LAYOUT, "ab", LAYOUT.initial(1))
EXACT = {"mean": Mean(FEDAVG), "clipped mean": Clipped(Mean(FEDAVG), 0.3), "median": Robust(FEDAVG, CoordinateMedian())}


def updates(count: int, tiers: tuple[int, ...] = (0,)) -> list[Update]:
    random = np.random.default_rng(count)
    return [
        Update(
            random.normal(0, 0.1, LAYOUT.size).astype(np.float32), int(random.integers(1, 99)), tiers[i % len(tiers)]
        )
        for i in range(count)
    ]


def whole_and_merged(aggregator: Any, frame: Frame, cohort: list[Any], parts: int) -> tuple[Any, Any]:
    """Runs one aggregation of all clients, and one of several parts that are merged at the end."""
    whole, sites = aggregator.begin(frame), [aggregator.begin(frame) for _ in range(parts)]
    for index, update in enumerate(cohort):
        whole.add(update)
        sites[index % parts].add(update)
    first, *others = sites
    for site in others:
        first.merge(site)
    return whole.finish(), first.finish()


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 12), parts=st.integers(1, 5))
def test_merged_parts_give_the_bits_of_the_whole(name: str, count: int, parts: int) -> None:
    whole, merged = whole_and_merged(EXACT[name], FRAME, updates(count), parts)
    assert whole.update.tobytes() == merged.update.tobytes()


def test_means_over_owners_of_mixed_ranks_merge_too() -> None:
    frame = Frame(LAYOUT, "ab", LAYOUT.initial(1), slices=rank_slices(3, 1, LAYOUT.rank, (1, 2, 4)))
    whole, merged = whole_and_merged(Mean(FEDAVG), frame, updates(7, (4, 1, 2)), 3)
    assert whole.update.tobytes() == merged.update.tobytes()


def test_means_of_products_merge_up_to_rounding() -> None:
    whole, merged = whole_and_merged(ProductMean(AGGREGATIONS["flexlora"]), FRAME, updates(6), 2)
    after = [LAYOUT.pairs(FRAME.adapter + each.update) for each in (whole, merged)]
    for module in after[0]:
        products = [views[module][1] @ views[module][0] for views in after]
        np.testing.assert_allclose(products[0], products[1], atol=1e-6)


@pytest.mark.parametrize("form", ["ring", "dense", "sparse", "exact"])
def test_payloads_merge_whether_they_are_decoded_one_by_one_or_added_first(form: str) -> None:
    uplink = Uplink(form, 4, 0.5, False, 8, (1.0, 1.0), True)
    terms = factor_terms(uplink, LAYOUT, "ab", 5, 1)
    frame = Frame(LAYOUT, "ab", LAYOUT.initial(1), terms=terms)
    cohort = []
    for seed, update in enumerate(updates(6)):
        halves = LAYOUT.parts(update.values)
        parts = [FORMS[form].encode(half, each, seed) for half, each in zip(halves, terms, strict=True)]
        cohort.append(Payloads(parts, update.weight))
    aggregator = Unpacked(RingMean(FEDAVG)) if form == "ring" else Decoded(Mean(FEDAVG), FORMS[form])
    whole, merged = whole_and_merged(aggregator, frame, cohort, 3)
    assert whole.update.tobytes() == merged.update.tobytes()
    assert whole.clips == merged.clips


def test_more_weight_than_a_sum_can_hold_is_refused_and_changes_nothing() -> None:
    full, more = (Mean(FEDAVG).begin(FRAME) for _ in range(2))
    full.add(Update(np.full(LAYOUT.size, 0.25, dtype=np.float32), MAX_WEIGHT))
    more.add(Update(np.full(LAYOUT.size, -1.0, dtype=np.float32), 1))
    before = full.finish().update.tobytes()
    with pytest.raises(UpdateError, match="on top of"):
        full.merge(more)
    assert full.finish().update.tobytes() == before
