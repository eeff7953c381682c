"""The selection of the coordinates of a sparse update."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedtune.core.codec.coordinate_selection import select_largest, selected_count

vectors = npst.arrays(
    np.float32, st.integers(0, 200), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e30, 1e-40])
)
densities = st.floats(0.001, 1.0)


@given(vectors, densities)
def test_a_selection_takes_the_largest_and_prefers_lower_positions_among_equals(
    update: np.ndarray, density: float
) -> None:
    order = sorted(range(update.size), key=lambda position: (-abs(float(update[position])), position))
    expected = sorted(order[: selected_count(update.size, density)])
    assert np.flatnonzero(select_largest(update, density)).tolist() == expected


def test_a_segment_with_coordinates_always_sends_one() -> None:
    assert selected_count(3, 0.001) == 1
    assert selected_count(0, 0.001) == 0


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        selected_count(10, density)
