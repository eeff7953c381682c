"""The weight cap comes to where a cohort's weights are, and lets few clients make a ring coarse for all."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.core.codec import MaskableCodec, RoundContext, next_weight_cap
from fedtune.core.codec.weight_cap import FIRST, LEAST

COUNT, CLIP = 500, 1.25


def adapted(cap: float, weights: list[int], rounds: int) -> float:
    """The cap after rounds with clients of these weights, capped and rounded as a round does it."""
    for _ in range(rounds):
        whole = round(cap)
        cap = next_weight_cap(float(np.mean([min(weight, whole) for weight in weights])))
    return cap


@pytest.mark.parametrize("start", [LEAST, FIRST["examples"], 1024.0])
@pytest.mark.parametrize("size", [5, 180, 700])
def test_it_comes_to_a_quarter_above_clients_of_one_size_from_wherever_it_starts(start: float, size: int) -> None:
    assert adapted(start, [size] * 10, rounds=30) == pytest.approx(1.25 * size, rel=0.05)


def test_clients_of_similar_size_weigh_what_they_have() -> None:
    weights = [150, 160, 170, 180, 190, 200]
    assert adapted(FIRST["examples"], weights, rounds=20) > max(weights)


def test_one_client_with_very_much_counts_as_little_more_than_the_rest() -> None:
    assert 20 < adapted(1024.0, [20] * 9 + [100_000], rounds=20) < 40


def test_it_comes_up_again_after_a_round_of_next_to_nothing() -> None:
    assert adapted(adapted(100.0, [1], rounds=10), [100], rounds=20) == pytest.approx(125.0)


def mean_error(cap: int) -> float:
    """‖mean - true mean‖² / ‖true mean‖² of ten clients with 180 examples each, at 2 bits."""
    codec = MaskableCodec(bits=2)
    context = RoundContext(0, np.ones(COUNT, dtype=np.bool_), CLIP, n_max=10)
    total, truth = codec.zero(context), np.zeros(COUNT)
    for client in range(10):
        direction = np.random.default_rng(client).standard_normal(COUNT)
        update = (direction / np.linalg.norm(direction)).astype(np.float32)
        total = codec.add(total, codec.encode(update, min(180, cap) / cap, client, context), context)
        truth += update / 10
    return float(np.square(codec.decode_sum(total, 10, context).update - truth).sum() / np.square(truth).sum())


def test_a_cap_near_the_weights_is_what_makes_few_bits_enough() -> None:
    assert mean_error(round(adapted(FIRST["examples"], [180] * 10, rounds=20))) < mean_error(1024) / 10
