"""Server optimizers agree with scalar loops written from the paper's algorithms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fedtune.core.adapter.layout import Factor
from fedtune.strategies.server_optimizers import Adaptive, Momentum, Plain, State, server_optimizer_named

ROUNDS = 6


def deltas() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0, 0.01, 5).astype(np.float32) for _ in range(ROUNDS)]


def reference(name: str, rate: float, values: list[float]) -> list[float]:
    """Runs the paper's algorithm on one coordinate, round after round."""
    momentum, second, steps = 0.0, 1e-3**2, []
    for delta in values:
        if name == "momentum":
            momentum = 0.9 * momentum + delta
            steps.append(rate * momentum)
            continue
        momentum = 0.9 * momentum + 0.1 * delta
        if name == "adam":
            second = 0.99 * second + 0.01 * delta**2
        elif name == "yogi":
            second = second - 0.01 * delta**2 * math.copysign(1.0, second - delta**2)
        else:
            second = second + delta**2
        steps.append(rate * momentum / (math.sqrt(second) + 1e-3))
    return steps


@pytest.mark.parametrize(("name", "rate"), [("momentum", 1.0), ("adam", 0.01), ("yogi", 0.01), ("adagrad", 0.01)])
def test_each_follows_its_equations(name: str, rate: float) -> None:
    optimizer = server_optimizer_named(name)
    state: State = {}
    steps = []
    for delta in deltas():
        step, state = optimizer.step("b", delta, state)
        steps.append(step)
    for place in range(5):
        wanted = reference(name, rate, [float(delta[place]) for delta in deltas()])
        np.testing.assert_allclose([step[place] for step in steps], wanted, rtol=1e-3, atol=1e-8)


def test_without_an_optimizer_the_step_is_the_aggregate() -> None:
    (delta, *_) = deltas()
    step, state = Plain().step("a", delta, {})
    assert step is delta
    assert state == {}


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi", "adagrad"])
def test_factors_have_states_of_their_own_and_a_state_is_never_changed(name: str) -> None:
    optimizer = server_optimizer_named(name)
    first, second, *_ = deltas()
    _, after_b = optimizer.step("b", first, {})
    copies = {key: value.copy() for key, value in after_b.items()}
    for factor in ("a", "b"):
        letter: Factor = "a" if factor == "a" else "b"
        _, after = optimizer.step(letter, second, after_b)
        assert all(np.array_equal(after_b[key], value) for key, value in copies.items())
    alone, _ = optimizer.step("a", second, {})
    beside, _ = optimizer.step("a", second, after_b)
    assert np.array_equal(alone, beside)
    assert set(after) == set(after_b)


def test_the_learning_rate_is_the_jobs_where_it_says_one() -> None:
    assert server_optimizer_named("momentum", 0.5) == Momentum(0.5)
    assert server_optimizer_named("yogi", 0.5) == replace(Adaptive("yogi"), learning_rate=0.5)
    assert server_optimizer_named("none") == Plain()
    with pytest.raises(ValueError, match="no server optimizer"):
        server_optimizer_named("sgd")
