"""The noise of one segment in one round: the grid, the variance of each client's noise, and the ring that holds it.

    noise = fit_noise(count, noised=h, n_max=n, rho=ρ)

In units of the grid a client contributes z, rounded from a vector of norm g = c/step, and adds N_Z(0, σ²) to each of
its d numbers. A sum has the noise of at least h of its clients, so

    Δ² = longest_rounded(g, d)²,    σ² = Δ²/(2·ρ·h),    rho_of_sum(Δ, σ², h, d) <= ρ

Rounding costs (Δ/g)² - 1 of variance, about d/(4·g²). ℓ is what a grid needs whose rounding costs MOST_ROUNDING and
whose σ is at least LEAST_DEVIATION, where the sum of discrete Gaussians is nearly one; g is then as large as ℓ bits
allow.

Words are taken modulo 2^ℓ, so a sum that leaves the range wraps around. That costs accuracy and no privacy, since it
happens to what is private already. A coordinate of the sum of n rotated vectors is sub-Gaussian with variance
(n·g)²/d where the rotation's blocks have equal energy, and its noise and rounding with n·(σ² + 1/4), so with

    2^ℓ > 2·κ·√((n·g)²/d + n·(σ² + 1/4)) + 1,    κ = √(2·ln(2·d/WRAPS))

a sum wraps in any coordinate with a probability below WRAPS (by Hoeffding's bound; Kairouz, Liu and Steinke, 2021).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil, log, log2, sqrt

from fedtune.core.errors import JobError
from fedtune.core.privacy.bounded_rounding import longest_rounded
from fedtune.core.privacy.discrete_gaussian import MAX_DEVIATION, PARTS, Variance
from fedtune.core.privacy.guarantee import rho_of_sum

MOST_ROUNDING = 0.1
LEAST_DEVIATION = 2.0
WRAPS = 2.0**-14
_MOST_BITS = 32


@dataclass(frozen=True)
class Noise:
    """The noise of a segment.

    Args:
        norm: g, the clip in units of the grid.
        longest: Δ, the largest norm of a client's rounded vector.
        variance: σ² of one client's noise.
        width: ℓ, the bits of a word.
    """

    norm: float
    longest: float
    variance: Variance
    width: int


@cache
def fit_noise(count: int, *, noised: int, n_max: int, rho: float) -> Noise:
    """Returns the noise with which a sum has ρ-zCDP.

    Args:
        count: d, the numbers of a contribution, with the rotation's padding.
        noised: h, the clients of a sum whose noise is in it for certain, at least 1.
        n_max: n, the most clients of a sum.
        rho: ρ of this segment in one round, above 0.

    Raises:
        JobError: the noise is larger than can be drawn, or than a word can hold; the message says what to change.
    """
    norm = sqrt(max(count / (4 * MOST_ROUNDING), 2 * rho * noised * LEAST_DEVIATION**2, 1.0))
    coarse = _on_grid(norm, count, noised, n_max, rho)
    if coarse.width > _MOST_BITS:
        raise JobError(
            [f"privacy: words of {coarse.width} bits for {count} values of {n_max} clients; at most {_MOST_BITS}"]
        )
    # Spread and deviation grow no faster than the norm, since what rounding adds to it stays; variances are multiples.
    finer = min(2.0**coarse.width / _needed(coarse, count, n_max), MAX_DEVIATION / sqrt(coarse.variance.value))
    return _on_grid(max(1.0, 0.99 * finer) * norm, count, noised, n_max, rho)


def _on_grid(norm: float, count: int, noised: int, n_max: int, rho: float) -> Noise:
    """Returns the least noise for contributions of norm g = `norm`, and the ring for it; raises as `fit_noise` does."""
    longest = longest_rounded(norm, count)
    parts = ceil(PARTS * longest**2 / (2 * rho * noised))
    while parts <= PARTS * MAX_DEVIATION**2 and rho_of_sum(longest, parts / PARTS, noised, count) > rho:
        parts += 1 + parts // 1000
    if parts > PARTS * MAX_DEVIATION**2:
        raise JobError([_too_much(sqrt(parts / PARTS), rho)])
    noise = Noise(norm, longest, Variance(parts), 0)
    return replace(noise, width=ceil(log2(_needed(noise, count, n_max))))


def _needed(noise: Noise, count: int, n_max: int) -> float:
    """Returns the fewest words of a ring in which a sum hardly ever wraps around, not a whole number."""
    spread = sqrt((n_max * noise.norm) ** 2 / count + n_max * (noise.variance.value + 0.25))
    return 2 * sqrt(2 * log(2 * count / WRAPS)) * spread + 1


def _too_much(deviation: float, rho: float) -> str:
    return (
        f"privacy: a deviation of {deviation:.0f} grid steps for ρ = {rho:.2g} a round is more than "
        f"{MAX_DEVIATION}; allow a larger privacy.epsilon, fewer participations or more clients in a round"
    )
