"""Clip and weight cap converge to a cohort's values from any start.

The clip fits most updates and reveals no client's norm; the cap keeps few clients from making a ring coarse for all.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.core.codec import ClipRange, MaskableCodec, RoundContext, initial_clip, next_weight_cap
from fedtune.core.codec.clipping import FIRST_WEIGHT_CAP, LEAST_WEIGHT_CAP

COUNT, CLIENTS = 500, 20
NORMS = np.linspace(0.8, 1.2, CLIENTS)


def adapted(state: ClipRange, norms: np.ndarray) -> ClipRange:
    """Runs one round of the codec with updates of these norms."""
    codec = MaskableCodec(bits=4)
    context = RoundContext(0, COUNT, state.clip, CLIENTS)
    total = codec.zero(context)
    for client, norm in enumerate(norms):
        direction = np.random.default_rng(client).standard_normal(COUNT)
        update = (norm * direction / np.linalg.norm(direction)).astype(np.float32)
        total = codec.add(total, codec.encode(update, 1.0, client, context), context)
    return state.adapt(codec.decode_sum(total, CLIENTS, context).mean_norm)


@pytest.mark.parametrize("start", [0.01, 1.0, 1000.0])
def test_within_a_few_rounds_a_clip_comes_from_far_off_to_where_updates_fit(start: float) -> None:
    state = ClipRange(start)
    for _ in range(5):
        state = adapted(state, NORMS)
    assert state.clip == pytest.approx(1.25, rel=0.01)


def test_one_client_moves_a_clip_by_no_more_than_its_share_of_the_bound() -> None:
    honest = adapted(ClipRange(1.0), NORMS)
    attacked = adapted(ClipRange(1.0), np.append(NORMS[:-1], 1e20))
    assert attacked.clip - honest.clip < 1.25 * 4 / CLIENTS


def test_a_round_of_nothing_shrinks_a_clip_by_a_bounded_factor() -> None:
    assert ClipRange(8.0).adapt(0.0).clip == 1.0
    assert ClipRange(1e-12).adapt(0.0).clip == 1e-12


def test_a_clip_s_start_follows_from_the_job() -> None:
    assert initial_clip(2e-3, 20, 10_000).clip == pytest.approx(4.0)
    assert initial_clip(2e-3, 20, 0).clip > 0


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_is_no_norm_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip"):
        ClipRange(clip)


def capped(cap: float, weights: list[int], rounds: int) -> float:
    """Returns the cap after rounds with clients of these weights, capped and rounded as in a round."""
    for _ in range(rounds):
        whole = round(cap)
        cap = next_weight_cap(float(np.mean([min(weight, whole) for weight in weights])))
    return cap


@pytest.mark.parametrize("start", [LEAST_WEIGHT_CAP, FIRST_WEIGHT_CAP["examples"], 1024.0])
@pytest.mark.parametrize("size", [5, 180, 700])
def test_a_cap_comes_to_a_quarter_above_clients_of_one_size_from_wherever_it_starts(start: float, size: int) -> None:
    assert capped(start, [size] * 10, rounds=30) == pytest.approx(1.25 * size, rel=0.05)


def test_clients_of_similar_size_weigh_what_they_have() -> None:
    weights = [150, 160, 170, 180, 190, 200]
    assert capped(FIRST_WEIGHT_CAP["examples"], weights, rounds=20) > max(weights)


def test_one_client_with_very_much_counts_as_little_more_than_the_rest() -> None:
    assert 20 < capped(1024.0, [20] * 9 + [100_000], rounds=20) < 40


def test_a_cap_comes_up_again_after_a_round_of_next_to_nothing() -> None:
    assert capped(capped(100.0, [1], rounds=10), [100], rounds=20) == pytest.approx(125.0)


def mean_error(cap: int) -> float:
    """Returns ‖mean - true mean‖² / ‖true mean‖² of ten clients with 180 examples each, at 2 bits."""
    codec = MaskableCodec(bits=2)
    context = RoundContext(0, COUNT, 1.25, n_max=10)
    total, truth = codec.zero(context), np.zeros(COUNT)
    for client in range(10):
        direction = np.random.default_rng(client).standard_normal(COUNT)
        update = (direction / np.linalg.norm(direction)).astype(np.float32)
        total = codec.add(total, codec.encode(update, min(180, cap) / cap, client, context), context)
        truth += update / 10
    return float(np.square(codec.decode_sum(total, 10, context).update - truth).sum() / np.square(truth).sum())


def test_a_cap_near_the_weights_is_what_makes_few_bits_enough() -> None:
    assert mean_error(round(capped(FIRST_WEIGHT_CAP["examples"], [180] * 10, rounds=20))) < mean_error(1024) / 10
