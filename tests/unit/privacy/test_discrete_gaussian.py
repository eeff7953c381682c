"""The exact sampler: its distribution against the definition, and its decisions against their probabilities."""

from __future__ import annotations

from math import exp, sqrt

import numpy as np
import pytest

from fedtune.core.privacy import discrete_gaussian as module
from fedtune.core.privacy.discrete_gaussian import (
    KEY_BYTES,
    MAX_DEVIATION,
    PARTS,
    KeyStream,
    Variance,
    discrete_gaussian,
)

DRAWS = 200_000
SIGMAS = 5.0  # of a count's own spread; one of a million counts is further off


def stream(number: int = 0) -> KeyStream:
    return KeyStream(number.to_bytes(KEY_BYTES, "big"))


def probabilities(variance: float) -> tuple[np.ndarray, np.ndarray]:
    reach = max(20, int(12 * sqrt(variance)))
    values = np.arange(-reach, reach + 1)
    weights = np.exp(-(values**2) / (2 * variance))
    return values, weights / weights.sum()


@pytest.mark.parametrize("parts", [3, PARTS, 5 * PARTS + 7, 100 * PARTS, 10_000 * PARTS])
def test_values_are_as_frequent_as_the_definition_says(parts: int) -> None:
    drawn = discrete_gaussian(Variance(parts), DRAWS, stream())
    values, expected = probabilities(parts / PARTS)
    counts = np.bincount(drawn - values[0], minlength=len(values))
    assert counts.sum() == DRAWS
    usual = expected * DRAWS > 25
    spread = np.sqrt(DRAWS * expected * (1 - expected))
    assert np.all(np.abs(counts - DRAWS * expected)[usual] < SIGMAS * spread[usual])
    rare = DRAWS * expected[~usual].sum()
    assert abs(counts[~usual].sum() - rare) < SIGMAS * max(1.0, sqrt(rare))


def test_the_largest_deviation_still_fits_the_words_of_the_decision() -> None:
    drawn = discrete_gaussian(Variance(PARTS * MAX_DEVIATION**2), DRAWS, stream())
    assert abs(drawn.var() / MAX_DEVIATION**2 - 1) < SIGMAS * sqrt(2 / DRAWS)
    assert abs(drawn.mean()) < SIGMAS * MAX_DEVIATION / sqrt(DRAWS)


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 7), (1, 7), (7, 7), (40, 7), (3, 1)])
def test_an_event_of_exponential_probability_happens_as_often(numerator: int, denominator: int) -> None:
    numerators = np.full(DRAWS, numerator, dtype=np.uint64)
    happened = module._with_exponential(numerators, denominator, stream()).mean()
    expected = exp(-numerator / denominator)
    assert abs(happened - expected) <= SIGMAS * sqrt(expected * (1 - expected) / DRAWS)


def test_words_of_the_incomplete_last_run_are_drawn_again() -> None:
    class Words:
        def __init__(self) -> None:
            self.left = [2**64 - 1, 5, 2**64 - 2, 2**64 - 1, 1]

        def draw(self, count: int) -> np.ndarray:
            taken, self.left = self.left[:count], self.left[count:]
            return np.array(taken, dtype=np.uint64)

    # 2^64 = 3·k + 1: the word 2^64 - 1 has no whole run of 3, and 2^64 - 2 is the last of one
    assert module._uniform(np.uint64(3), 2, Words()).tolist() == [2, 2]


def test_one_key_gives_one_noise_and_another_key_another() -> None:
    first, again, other = (discrete_gaussian(Variance(160), 1000, stream(number)) for number in (1, 1, 2))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2


@pytest.mark.parametrize("parts", [0, -1, PARTS * MAX_DEVIATION**2 + 1])
def test_a_variance_that_cannot_be_drawn_is_refused(parts: int) -> None:
    with pytest.raises(ValueError, match="σ² lies in"):
        Variance(parts)
