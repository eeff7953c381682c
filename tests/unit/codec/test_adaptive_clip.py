"""A clip converges to a cohort's norms from any start; it fits most updates and reveals no client's norm."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.core.codec import ClipRange, MaskableCodec, RoundContext, largest_norm

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
        total = codec.add(total, codec.encode(update, client, context), context)
    mean_norm = codec.decode_sum(total, CLIENTS, context).mean_norm
    assert mean_norm is not None
    return state.adapt(mean_norm)


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


def test_what_a_round_s_steps_can_reach_follows_from_the_job() -> None:
    assert largest_norm("adamw", 2e-3, 20, 10_000) == pytest.approx(4.0)
    assert largest_norm("muon", 2e-3, 20, 10_000) == pytest.approx(1.0)
    assert largest_norm("adamw", 2e-3, 20, 0) > 0


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_is_no_norm_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip"):
        ClipRange(clip)
