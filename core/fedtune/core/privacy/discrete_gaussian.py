"""Exact samples of the discrete Gaussian, vectorised: N_Z(0, σ²) has P(x) ∝ exp(-x²/2σ²) on the whole numbers.

    noise = discrete_gaussian(Variance(1024), count, stream)         # σ² = 1024/16 = 64

Every decision is one of whole numbers (Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy",
2020), so that no rounding of floats, which differs from machine to machine, can tell about the value to which the noise
is added (Mironov, "On significance of the least significant bits for differential privacy", 2012):

    uniform      u below m: a 64-bit word modulo m; words in the incomplete last run of m are left out
    exp(-a/b)    with A_k true with probability a/(b·k): the first k with A_k false is odd (0 <= a <= b)
    Laplace      scale t: U below t, kept with exp(-U/t); V, the number of successes of exp(-1); X = U + t·V and a sign
    Gaussian     X of the Laplace with t = floor(σ) + 1, kept with exp(-(|X| - σ²/t)²/2σ²)

With σ² = s/16 the last exponent is (16·t·|X| - s)²/(32·s·t²), whose parts stay below 2^63 for σ up to MAX_DEVIATION.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

PARTS = 16
"""A variance is a multiple of 1/PARTS."""
MAX_DEVIATION = 1 << 11
_MOST_SCALES = 40  # a Laplace sample above so many scales is drawn once in 10^17; it is drawn again
_WORD = 64
KEY_BYTES = 32

Whole = NDArray[np.int64]


class Stream(Protocol):
    """A source of uniform 64-bit words."""

    def draw(self, count: int) -> NDArray[np.uint64]:
        """Returns the next `count` words."""
        ...


class KeyStream:
    """The AES-256-CTR keystream of a key as uniform words; whoever does not know the key cannot foresee them.

    Args:
        key: 32 bytes, used for nothing else: of a device's entropy, or of a simulation's seed.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def draw(self, count: int) -> NDArray[np.uint64]:
        """Returns the next `count` words."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


@dataclass(frozen=True)
class Variance:
    """σ² = parts/PARTS.

    Raises:
        ValueError: σ² is not above 0, or σ exceeds MAX_DEVIATION.
    """

    parts: int

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= PARTS * MAX_DEVIATION**2:
            raise ValueError(f"σ² lies in 1/{PARTS} to {MAX_DEVIATION**2}, got {self.parts}/{PARTS}")

    @property
    def value(self) -> float:
        """σ²."""
        return self.parts / PARTS


def discrete_gaussian(variance: Variance, count: int, stream: Stream) -> Whole:
    """Draws `count` independent samples of N_Z(0, σ²): int64, shape (count,)."""
    samples = np.empty(count, dtype=np.int64)
    found, scale = 0, isqrt(variance.parts // PARTS) + 1
    denominator = 2 * PARTS * variance.parts * scale**2
    while found < count:
        drawn = _laplace(scale, 2 * (count - found) + _WORD, stream)
        distance = np.abs(PARTS * scale * np.abs(drawn) - variance.parts)
        drawn = drawn[_with_exponential(distance.astype(np.uint64) ** np.uint64(2), denominator, stream)]
        kept = drawn[: count - found]
        samples[found : found + kept.size] = kept
        found += kept.size
    return samples


def _laplace(scale: int, count: int, stream: Stream) -> Whole:
    """Draws up to `count` samples x with P(x) ∝ exp(-|x|/scale)."""
    below = _uniform(np.uint64(scale), count, stream)
    below = below[_with_exponential(below, scale, stream)]
    wholes = np.zeros(below.size, dtype=np.int64)
    alive = np.arange(below.size)
    while alive.size:
        alive = alive[_with_exponential(np.ones(alive.size, dtype=np.uint64), 1, stream)]
        wholes[alive] += 1
    sizes = below.astype(np.int64) + scale * wholes
    negative = (stream.draw(sizes.size) & np.uint64(1)).astype(bool)
    kept = ~(negative & (sizes == 0)) & (wholes < _MOST_SCALES)
    signed: Whole = np.where(negative, -sizes, sizes)[kept]
    return signed


def _with_exponential(numerators: NDArray[np.uint64], denominator: int, stream: Stream) -> NDArray[np.bool_]:
    """Decides for each a whether an event of probability exp(-a/b) happens."""
    whole, rest = np.divmod(numerators, np.uint64(denominator))
    happens = _with_small_exponential(rest, denominator, stream)
    alive = np.flatnonzero(happens & (whole > 0))
    left = whole[alive]
    while alive.size:
        still = _with_small_exponential(np.ones(alive.size, dtype=np.uint64), 1, stream)
        happens[alive[~still]] = False
        left = left[still] - np.uint64(1)
        alive = alive[still][left > 0]
        left = left[left > 0]
    return happens


def _with_small_exponential(numerators: NDArray[np.uint64], denominator: int, stream: Stream) -> NDArray[np.bool_]:
    """Decides for each a <= b whether an event of probability exp(-a/b) happens."""
    happens = np.zeros(numerators.size, dtype=np.bool_)
    alive, k = np.arange(numerators.size), 1
    while alive.size:
        goes_on = _uniform(np.uint64(denominator * k), alive.size, stream) < numerators[alive]
        happens[alive[~goes_on]] = k % 2 == 1
        alive, k = alive[goes_on], k + 1
    return happens


def _uniform(bound: np.uint64, count: int, stream: Stream) -> NDArray[np.uint64]:
    """Draws `count` uniform whole numbers below the bound."""
    most = np.uint64((1 << _WORD) - 1 - (1 << _WORD) % int(bound))
    words = stream.draw(count)
    while (outside := np.flatnonzero(words > most)).size:
        words = words.copy()
        words[outside] = stream.draw(outside.size)
    found: NDArray[np.uint64] = words % bound
    return found
