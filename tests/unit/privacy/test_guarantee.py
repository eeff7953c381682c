"""The guarantee against dp-accounting, against the definition of its terms, and the noise that is fitted to it."""

from __future__ import annotations

from math import exp, pi, sqrt

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedtune.core.codec.ring import Ring
from fedtune.core.codec.rotation import rotated_size
from fedtune.core.errors import JobError
from fedtune.core.privacy.guarantee import epsilon_of, largest_rho, rho_of_sum
from fedtune.core.privacy.mechanism import LEAST_DEVIATION, fit_noise

PAIRS = [(8.0, 5e-4), (4.0, 1e-5), (1.0, 1e-6), (0.1, 1e-6), (40.0, 1e-5)]


@pytest.mark.parametrize(("epsilon", "delta"), PAIRS)
def test_epsilon_agrees_with_dp_accounting_to_one_percent(epsilon: float, delta: float) -> None:
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant  # type: ignore[import-untyped]

    rho = largest_rho(epsilon, delta)
    accountant = RdpAccountant(orders=list(1 + np.geomspace(0.01, 1e4, 500)))
    accountant.compose(accounting.GaussianDpEvent(1 / sqrt(2 * rho)))
    assert epsilon_of(rho, delta) == pytest.approx(epsilon, rel=1e-9)
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=0.01)


@given(st.floats(1e-4, 50.0), st.floats(1e-9, 0.1))
def test_no_order_gives_a_smaller_epsilon_and_the_old_conversion_a_larger_one(rho: float, delta: float) -> None:
    epsilon = epsilon_of(rho, delta)
    orders = 1 + np.geomspace(1e-3, 1e4, 2000)
    others = orders * rho + (orders * np.log1p(-1 / orders) - np.log(delta) - np.log(orders - 1)) / (orders - 1)
    assert epsilon <= max(0.0, float(others.min())) + 1e-9
    assert epsilon >= float(others.min()) - 1e-3 * max(1.0, epsilon)
    assert epsilon <= rho + 2 * sqrt(-rho * np.log(delta)) + 1e-9


def test_rounds_add_up_in_rho() -> None:
    assert epsilon_of(0.0, 1e-5) == 0.0
    assert epsilon_of(2 * 0.3, 1e-5) < 2 * epsilon_of(0.3, 1e-5)
    assert epsilon_of(0.6, 1e-5) > epsilon_of(0.3, 1e-5)


def divergence(shift: int, variance: float, clients: int, order: float) -> float:
    """Returns the Rényi divergence between a sum of discrete Gaussians and the same sum moved, in one dimension."""
    values = np.arange(-400, 401)
    single = np.exp(-(values**2) / (2 * variance))
    single /= single.sum()
    total = single
    for _ in range(clients - 1):
        total = np.convolve(total, single, mode="same")
    p, q = total[200 + shift : 600 + shift], total[200:600]
    seen = (p > 1e-30) & (q > 1e-30)  # beyond them lies nothing that counts
    return float(np.log(np.sum(p[seen] ** order * q[seen] ** (1 - order))) / (order - 1))


@pytest.mark.parametrize(("shift", "variance", "clients"), [(1, 0.5, 3), (2, 1.0, 2), (3, 4.0, 5), (1, 1.0, 1)])
def test_rho_bounds_the_divergence_of_real_sums(shift: int, variance: float, clients: int) -> None:
    rho = rho_of_sum(shift, variance, clients, 1)
    for order in (1.5, 2.0, 4.0, 8.0):
        assert divergence(shift, variance, clients, order) <= order * rho * (1 + 1e-9)


def test_from_two_grid_steps_on_the_sum_is_as_good_as_one_gaussian() -> None:
    assert rho_of_sum(30.0, LEAST_DEVIATION**2, 100, 10**6) == pytest.approx(30.0**2 / (2 * 100 * 4), rel=1e-6)
    lack = 10 * exp(-2 * pi**2 * 0.25 / 2)
    assert rho_of_sum(1.0, 0.25, 2, 1) == pytest.approx(min(sqrt(2 + lack / 2), sqrt(2) + lack) ** 2 / 2)
    assert rho_of_sum(1.0, 4.0, 0, 1) == float("inf")


@given(st.integers(1, 10**6), st.integers(1, 1000), st.floats(0.01, 20.0), st.floats(1.0, 3.0))
def test_fitted_noise_spends_its_rho_and_hardly_less(count: int, noised: int, rho: float, more: float) -> None:
    n_max = int(noised * more)
    try:
        noise = fit_noise(count, noised=noised, n_max=n_max, rho=rho)
    except JobError:
        assume(False)
    spent = rho_of_sum(noise.longest, noise.variance.value, noised, count)
    assert 0.85 * rho < spent <= rho
    assert (noise.longest / noise.norm) ** 2 < 1.5 or count < 100
    spread = sqrt((n_max * noise.norm) ** 2 / count + n_max * (noise.variance.value + 0.25))
    assert 2 ** (noise.width - 1) > 4.5 * spread


@pytest.mark.parametrize(("rank", "epsilon", "more"), [(24, 8.0, 2), (16, 4.0, 2), (24, 4.0, 2), (24, 1.0, 4)])
def test_a_word_of_a_hundred_clients_grows_by_few_bits(rank: int, epsilon: float, more: int) -> None:
    """The demo's core adapters, two participations, δ = 1000^-1.1; words without privacy have ten bits."""
    words, rho = rotated_size(21 * rank**2), largest_rho(epsilon, 1000**-1.1) / 2
    noise = fit_noise(words, noised=85, n_max=100, rho=rho)
    assert noise.width <= Ring(3, 100).width + more
    assert (noise.longest / noise.norm) ** 2 < 1.12


def test_noise_that_cannot_be_drawn_is_refused_with_the_remedy() -> None:
    with pytest.raises(JobError, match=r"a larger privacy\.epsilon, fewer participations or more clients"):
        fit_noise(10**6, noised=1, n_max=3, rho=1e-4)
