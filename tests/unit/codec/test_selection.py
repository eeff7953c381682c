"""Public and private selection of coordinates."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedtune.core.codec.coordinate_selection import select_largest, select_public, selected_count

vectors = npst.arrays(
    np.float32, st.integers(0, 200), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e30, 1e-40])
)
densities = st.floats(0.001, 1.0)


@given(vectors, densities)
def test_private_selection_takes_the_largest_and_prefers_lower_positions_among_equals(
    update: np.ndarray, density: float
) -> None:
    order = sorted(range(update.size), key=lambda position: (-abs(float(update[position])), position))
    expected = sorted(order[: selected_count(update.size, density)])
    assert np.flatnonzero(select_largest(update, density)).tolist() == expected


@given(st.integers(0, 500), densities, st.integers(0, 1 << 62), st.integers(0, 1 << 40))
def test_no_coordinate_waits_longer_than_its_turn(count: int, density: float, seed: int, selection_phase: int) -> None:
    rounds = min(ceil(1 / density), 50)
    masks = [select_public(count, density, seed, selection_phase + later) for later in range(rounds)]
    sent = np.sum(masks, axis=0)
    if rounds == ceil(1 / density):
        assert (sent >= 1).all()
    assert (sent <= 2).all()


def test_a_public_selection_is_random_and_of_about_the_wanted_size() -> None:
    first, other = (
        select_public(100_000, 0.25, seed=1, selection_phase=0),
        select_public(100_000, 0.25, seed=2, selection_phase=0),
    )
    assert first.mean() == pytest.approx(0.25, abs=0.01)
    assert (first & other).mean() == pytest.approx(0.0625, abs=0.01)


def test_selection_phases_are_disjoint_until_every_coordinate_was_selected() -> None:
    selection_phases = [
        select_public(10_000, 0.25, seed=1, selection_phase=selection_phase) for selection_phase in range(8)
    ]
    assert np.array_equal(np.sum(selection_phases[:4], axis=0), np.ones(10_000))
    assert all(
        np.array_equal(selection_phases[selection_phase], selection_phases[selection_phase + 4])
        for selection_phase in range(4)
    )


def test_a_segment_with_coordinates_always_sends_one() -> None:
    assert selected_count(3, 0.001) == 1
    assert selected_count(0, 0.001) == 0


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        selected_count(10, density)
