"""The guarantee of a job in numbers: zero-concentrated differential privacy, and (ε, δ) of it, in closed forms.

    rho = largest_rho(epsilon=8.0, delta=5e-4)             # what all rounds of one client may spend together
    epsilon = epsilon_of(rho, delta=5e-4)

A mechanism has ρ-zCDP if the Rényi divergence of order α between its outputs with and without one client is at most
α·ρ, for every α > 1 (Bun and Steinke, 2016). ρ adds up over rounds, whoever chooses the cohorts. Of ρ follows
(ε, δ) by the best order (Canonne, Kamath and Steinke, 2020, corollary 13):

    δ = min over α > 1 of exp((α - 1)·(α·ρ - ε))/(α - 1)·(1 - 1/α)^α

The noise of a sum of h discrete Gaussians of variance σ² each, on whole numbers, d of them, with Δ the largest norm of
a client's contribution, gives ρ = ε₀²/2 (Kairouz, Liu and Steinke, "The distributed discrete Gaussian mechanism for
federated learning with secure aggregation", 2021, theorem 1):

    ε₀ = min(√(Δ²/(h·σ²) + τ·d/2), Δ/(√h·σ) + τ·√d),    τ = 10·Σ exp(-2π²·σ²·k/(k + 1)),  k = 1 … h - 1

τ is what a sum of discrete Gaussians lacks to be one; from σ = 2 on it is below 10^-15 a client.
"""

from __future__ import annotations

from functools import cache
from math import exp, inf, log, log1p, pi, sqrt

OWNER_DELTA = 1e-6  # δ of the ε that a device's owner allows all jobs together
_LEAST_ORDER, _MOST_ORDER = 1e-6, 1e6  # of α - 1
_HALVINGS = 200
_GOLDEN = (sqrt(5.0) - 1.0) / 2.0


def epsilon_of(rho: float, delta: float) -> float:
    """Returns the least ε such that ρ-zCDP implies (ε, δ); 0 for ρ = 0.

    Args:
        delta: above 0 and below 1.
    """
    if rho <= 0:
        return 0.0

    def epsilon(logarithm: float) -> float:
        above = exp(logarithm)  # α - 1
        order = 1.0 + above
        return order * rho + (order * log1p(-1.0 / order) - log(delta) - log(above)) / above

    low, high = log(_LEAST_ORDER), log(_MOST_ORDER)
    for _ in range(_HALVINGS):  # one minimum: golden section
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if epsilon(left) < epsilon(right) else (left, high)
    return max(0.0, epsilon((low + high) / 2))


@cache
def largest_rho(epsilon: float, delta: float) -> float:
    """Returns the largest ρ whose (ε, δ) is within these; both above 0."""
    low, high = 0.0, epsilon + 1.0  # ρ < ε + 1 for every δ below 1/e, and bisection finds any below
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of(middle, delta) <= epsilon else (low, middle)
    return low


def rho_of_sum(sensitivity: float, variance: float, noised: int, count: int) -> float:
    """Returns ρ of one sum of whole numbers to which clients have added discrete Gaussian noise.

    Args:
        sensitivity: Δ, the largest norm of a client's contribution before its noise.
        variance: σ² of the noise of one client.
        noised: h, the clients whose noise is in the sum for certain.
        count: d, the numbers of a contribution.
    """
    if noised < 1:
        return inf
    lack = 10.0 * sum(exp(-2.0 * pi**2 * variance * k / (k + 1)) for k in range(1, noised))
    ratio = sensitivity / sqrt(noised * variance)
    return min(sqrt(ratio**2 + lack * count / 2), ratio + lack * sqrt(count)) ** 2 / 2
