"""Mixed ranks: nested tiers under a public permutation, means over owners, and changes of basis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.adapter.basis import follow, rebalance
from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.adapter.tiers import merged_tiers, rank_indices, rank_slices, tier_for
from fedtune.core.errors import UpdateError
from fedtune.strategies.aggregation import Frame, Update
from fedtune.strategies.aggregation.mean import MeanOfOwners

LAYOUT = LoraLayout((AdaptedModule("q", 5, 7), AdaptedModule("v", 6, 3)), rank=4, alpha=2.0)
FACTORS: Any = ("a", "b")


def trained_mask(factor: str, owned: Any) -> np.ndarray:
    """Returns a vector of zeros with ones at the owned rank indices, found by the modules' names."""
    vector = np.zeros(LAYOUT.size, dtype=np.float32)
    for lora_a, lora_b in LAYOUT.pairs(vector).values():
        if factor == "a":
            lora_a[owned, :] = 1
        else:
            lora_b[:, owned] = 1
    return vector[LAYOUT.segment(factor)].astype(bool)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("tier", [1, 2, 4])
def test_coordinates_are_the_owned_rows_of_a_or_columns_of_b(factor: Any, tier: int) -> None:
    owned = rank_indices(3, 5, LAYOUT.rank, tier)
    indices = LAYOUT.coordinates(factor, owned)
    assert np.array_equal(np.sort(indices), np.flatnonzero(trained_mask(factor, owned)))


def test_tiers_are_nested_public_and_reach_every_index_over_the_rounds() -> None:
    small, large = rank_indices(0, 7, 16, 4), rank_indices(0, 7, 16, 8)
    assert set(small) < set(large)
    assert np.array_equal(small, rank_indices(0, 7, 16, 4))
    assert not np.array_equal(small, rank_indices(1, 7, 16, 4))
    assert set(np.concatenate([rank_indices(0, number, 16, 4) for number in range(40)])) == set(range(16))
    parts = rank_slices(0, 7, 16, [16, 4, 8, 4])
    assert [part.tier for part in parts] == [4, 8, 16]
    assert sorted(np.concatenate([np.setdiff1d(part.owned, part.inner) for part in parts])) == list(range(16))
    assert set(parts[1].owned) == set(large) > set(parts[1].inner) == set(parts[0].owned)
    with pytest.raises(ValueError, match="a tier of 17"):
        rank_indices(0, 0, 16, 17)


def test_a_device_trains_the_largest_tier_that_its_rank_allows() -> None:
    assert [tier_for(rank, (4, 8, 16)) for rank in (3, 4, 9, 16, 99)] == [0, 4, 8, 16, 16]


@pytest.mark.parametrize(
    ("counts", "least", "trained"),
    [
        ({4: 5, 8: 5, 16: 5}, 3, {4: 4, 8: 8, 16: 16}),
        ({4: 5, 8: 5, 16: 2}, 3, {4: 4, 8: 8, 16: 8}),
        ({4: 5, 8: 1, 16: 1}, 3, {4: 4, 8: 4, 16: 4}),
        ({4: 1, 8: 2, 16: 4}, 3, {4: 4, 8: 4, 16: 16}),
        ({4: 1, 16: 4}, 3, {4: 0, 16: 16}),
        ({4: 1, 16: 4}, 1, {4: 4, 16: 16}),
        ({4: 1, 8: 1}, 3, {4: 0, 8: 0}),
        ({}, 3, {}),
    ],
)
def test_a_tier_with_too_few_clients_merges_downward_or_sits_out(
    counts: dict[int, int], least: int, trained: dict[int, int]
) -> None:
    assert merged_tiers(counts, least) == trained


@given(st.dictionaries(st.integers(1, 64), st.integers(1, 20)), st.integers(1, 9))
def test_every_tier_that_is_trained_has_enough_clients_of_its_own_and_nobody_trains_more_than_it_can(
    counts: dict[int, int], least: int
) -> None:
    trained = merged_tiers(counts, least)
    assert trained.keys() == counts.keys()
    assert all(after <= tier for tier, after in trained.items())
    for tier in set(trained.values()) - {0}:
        assert sum(count for other, count in counts.items() if trained[other] == tier) >= least
    assert sum(count for tier, count in counts.items() if not trained[tier]) < least


def clients() -> list[tuple[int, int, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        (tier, weight, random.normal(0, 0.1, LAYOUT.size)) for tier, weight in ((1, 3), (2, 50), (2, 7), (4, 1), (1, 9))
    ]


def owned_mean(factors: Any, tiers: list[int]) -> MeanOfOwners:
    return MeanOfOwners(Frame(LAYOUT, factors, LAYOUT.initial(0), slices=rank_slices(2, 3, LAYOUT.rank, tiers)))


@pytest.mark.parametrize("factors", ["a", "b", "ab"])
def test_every_index_is_divided_by_the_weight_of_its_owners(factors: Any) -> None:
    mean = owned_mean(factors, [1, 2, 4])
    size = LAYOUT.segment(factors).stop - LAYOUT.segment(factors).start
    top, bottom = np.zeros(size), np.zeros(size)
    for tier, weight, noise in clients():
        mask = np.concatenate([trained_mask(letter, rank_indices(2, 3, 4, tier)) for letter in factors])
        update = noise[:size].astype(np.float32)
        mean.add(Update(update, weight, tier))
        top[mask] += weight * update[mask].astype(np.float64)
        bottom[mask] += weight
    np.testing.assert_allclose(mean.finish().update, top / bottom, atol=1e-7)


def test_an_index_that_nobody_owned_stays_as_it_is() -> None:
    mean = owned_mean("b", [1, 4])
    owned = trained_mask("b", rank_indices(2, 3, 4, 1))
    mean.add(Update(np.ones(owned.size, dtype=np.float32), 5, 1))
    assert np.array_equal(mean.finish().update, owned.astype(np.float32))


def test_with_one_tier_the_owned_mean_is_the_weighted_mean() -> None:
    mean = MeanOfOwners(Frame(LAYOUT, "a", LAYOUT.initial(0)))
    random = np.random.default_rng(1)
    updates = [random.normal(0, 0.1, LAYOUT.size_a).astype(np.float32) for _ in range(3)]
    for weight, update in zip((1, 2, 5), updates, strict=True):
        mean.add(Update(update, weight))
    wanted = (updates[0] + 2.0 * updates[1] + 5.0 * updates[2].astype(np.float64)) / 8
    np.testing.assert_allclose(mean.finish().update, wanted, atol=1e-7)


def test_an_update_of_another_tier_or_size_is_refused_and_changes_nothing() -> None:
    mean = owned_mean("b", [2, 4])
    good = np.ones(40, dtype=np.float32)
    mean.add(Update(good, 1, 2))
    before = mean.finish().update.tobytes()
    late = good.copy()
    late[rank_slices(2, 3, 4, [2, 4])[1].coordinates(LAYOUT, "b")] = np.nan  # only in the last slice
    for update, weight, tier in (
        (good, 1, 3),
        (good, 1, 0),
        (good[:-1], 1, 2),
        (good, 0, 2),
        (good * np.nan, 1, 2),
        (late, 1, 4),
        (good, 1 << 24, 2),
    ):
        with pytest.raises(UpdateError):
            mean.add(Update(update.astype(np.float32), weight, tier))
    assert mean.finish().update.tobytes() == before


def test_order_of_arrival_does_not_change_a_bit() -> None:
    results = []
    for order in (clients(), clients()[::-1]):
        mean = owned_mean("ab", [1, 2, 4])
        for tier, weight, noise in order:
            mean.add(Update(noise.astype(np.float32), weight, tier))
        results.append(mean.finish().update.tobytes())
    assert results[0] == results[1]


def random_adapter(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, LAYOUT.size).astype(np.float32)


def products(adapter: Any) -> list[np.ndarray]:
    return [lora_b.astype(np.float64) @ lora_a for lora_a, lora_b in LAYOUT.pairs(adapter).values()]


def test_rebalancing_changes_no_product_and_balances_the_factors() -> None:
    adapter = random_adapter()
    balanced, _ = rebalance(LAYOUT, adapter)
    for before, after in zip(products(adapter), products(balanced), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)
    lora_a, lora_b = LAYOUT.pairs(balanced)["q"]
    np.testing.assert_allclose(lora_a @ lora_a.T, lora_b.T @ lora_b, atol=1e-5)
    # Squared norms of the rows are the singular values of the product.
    values = np.linalg.svd(products(adapter)[0])[1][:4]
    np.testing.assert_allclose(np.square(lora_a).sum(axis=1), values, rtol=1e-4)


def test_what_lives_in_the_basis_follows_it() -> None:
    adapter, update = random_adapter(), random_adapter(1)
    balanced, changes = rebalance(LAYOUT, adapter)
    # Only "q": "v" has only three rows for four ranks, so one of its directions is zero.
    lora_a, lora_b = LAYOUT.pairs(adapter)["q"]
    new_a, new_b = LAYOUT.pairs(balanced)["q"]
    half_a, half_b = LAYOUT.parts(update)
    moved = np.concatenate([follow(LAYOUT, changes, "a", half_a), follow(LAYOUT, changes, "b", half_b)])
    delta_a, delta_b = LAYOUT.pairs(update)["q"]
    moved_a, moved_b = LAYOUT.pairs(moved.astype(np.float32))["q"]
    np.testing.assert_allclose((new_b + moved_b) @ new_a, (lora_b + delta_b) @ lora_a, atol=1e-4)
    np.testing.assert_allclose(new_b @ (new_a + moved_a), lora_b @ (lora_a + delta_a), atol=1e-4)
    np.testing.assert_allclose(changes["q"].t_inverse @ changes["q"].t, np.eye(4), atol=1e-8)


def test_before_anything_is_learned_rebalancing_leaves_the_adapter_as_it_is() -> None:
    adapter = LAYOUT.initial(0)
    balanced, changes = rebalance(LAYOUT, adapter)
    assert balanced.tobytes() == adapter.tobytes()
    half = LAYOUT.parts(random_adapter())[1]
    assert np.array_equal(follow(LAYOUT, changes, "b", half), half)


def test_directions_without_weight_keep_a_row_to_train_and_a_zero_column() -> None:
    adapter = random_adapter()
    for _, lora_b in LAYOUT.pairs(adapter).values():
        lora_b[:, 1:] = 0
    balanced, changes = rebalance(LAYOUT, adapter)
    for before, after in zip(products(adapter), products(balanced), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)
    lora_a, lora_b = LAYOUT.pairs(balanced)["q"]
    assert not lora_b[:, 1:].any()
    gram = lora_a @ lora_a.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
    assert np.diag(gram)[1:] == pytest.approx(1 / 3, rel=1e-5)
    assert not changes["q"].t[:, 1:].any()
