"""The exact weighted sum does not depend on the order of arrival."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import UpdateError
from fedtune.strategies.aggregation.mean import FRACTION_BITS, MAX_VALUE, MAX_WEIGHT, ExactSum

values = st.floats(-MAX_VALUE, MAX_VALUE, width=32)
updates = st.lists(st.tuples(st.lists(values, min_size=3, max_size=3), st.integers(1, 1024)), min_size=1, max_size=8)


def summed(parts: list[tuple[list[float], int]]) -> ExactSum:
    total = ExactSum(3)
    for vector, weight in parts:
        total.add(np.array(vector, dtype=np.float32), weight)
    return total


@given(updates, st.randoms())
def test_order_of_arrival_does_not_change_a_bit(parts: list[tuple[list[float], int]], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert summed(parts).mean().tobytes() == summed(shuffled).mean().tobytes()


@given(updates)
def test_it_is_the_weighted_mean_in_rational_arithmetic(parts: list[tuple[list[float], int]]) -> None:
    weight = sum(weight for _, weight in parts)
    mean = summed(parts).mean()
    for index in range(3):
        exact = sum((Fraction(vector[index]) * weight for vector, weight in parts), Fraction(0)) / weight
        step = 2.0**-FRACTION_BITS
        assert abs(Fraction(float(mean[index])) - exact) <= Fraction(step + 2e-7 * abs(float(exact)))


def test_the_largest_values_at_the_largest_weight_do_not_wrap() -> None:
    total = ExactSum(2)
    half = MAX_WEIGHT // 2
    for _ in range(2):
        total.add(np.array([MAX_VALUE, -MAX_VALUE], dtype=np.float32), half)
    assert total.mean().tolist() == [MAX_VALUE, -MAX_VALUE]
    with pytest.raises(UpdateError, match="weight"):
        total.add(np.zeros(2, dtype=np.float32), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * MAX_VALUE])
def test_a_value_that_cannot_be_summed_is_refused_and_changes_nothing(value: float) -> None:
    total = ExactSum(2)
    total.add(np.ones(2, dtype=np.float32), 1)
    with pytest.raises(UpdateError):
        total.add(np.array([0.0, value], dtype=np.float32), 1)
    with pytest.raises(UpdateError, match="3 values; expected 2"):
        total.add(np.ones(3, dtype=np.float32), 1)
    with pytest.raises(UpdateError, match="weight 0"):
        total.add(np.ones(2, dtype=np.float32), 0)
    assert total.mean().tolist() == [1.0, 1.0]
    assert total.weight == 1


def test_the_mean_of_nothing_is_zero() -> None:
    assert ExactSum(3).mean().tolist() == [0.0, 0.0, 0.0]
