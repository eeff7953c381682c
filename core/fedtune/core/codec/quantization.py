"""Uniform quantization, in the two forms that the codecs need.

*Stochastic, fixed range*, for sums under masks: with L the largest word and step δ = 2R/L,

    u = floor((clip(y, ±R) + R)/δ + U),   U uniform on [0, 1),    so that   E[δ·u - R] = clip(y, ±R).

This rounding is unbiased, so the errors of n clients average out; each client must draw its own U. It is computed in
fixed point with DITHER_BITS fractional bits: the largest value is L·2^16, and adding at most 2^16 - 1 and shifting
gives at most L. The bound on which the ring's overflow proof relies thus follows from integer arithmetic and does not
depend on float rounding.

*Nearest, open range*, for values that are entropy-coded: level = round(x/δ), with no largest level. Of the adapter on
the downlink and of the values that a sparse update carries, the error stays with the sender, which sends it later.

*Dithered, open range*, for values whose error stays with nobody: with the same U - 1/2 on both sides,

    level = round(x/δ + U - 1/2),    x̂ = δ·(level - (U - 1/2)),    so that   x̂ - x is uniform on ±δ/2 for any x.

This rounding is unbiased too, and has half the error power of the stochastic one (Roberts 1962; Schuchman 1964).
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.seeds import draw_uint16, open_stream

MIN_RANGE = 1.0
RANGE_OFFSET = 0.5  # fits the best of κ = 1, 1.5 ... 3 on the demo's updates for L = 1 to 15
STEP_RANGE = 3.0  # κ of the open range: how many root mean squares 2^(b - 1) steps span
DITHER_BITS = 16
MIN_STEP_BITS, MAX_STEP_BITS = 2, 8
MIN_STEP = 2.0**-100  # far below any trained parameter, far above where float32 loses precision
MAX_STEP = 2.0**102
MAX_LEVEL = 1 << 24  # whole numbers up to here are exact in float32, and times MAX_STEP they are finite

_PIECE = 1 << 16  # values at a time: temporaries stay in the cache


def public_range(clip: float, size: int, levels: int, n_max: int) -> float:
    """Returns R = κ·c/√d: κ standard deviations of a coordinate of a rotated vector of `size` values and norm `clip`.

    κ = √ln(n·L²) - 1/2, at least 1. Rounding errors grow with κ²/L² and average out over n clients; the error of
    clipping falls like exp(-κ²/2) and does not average out. This κ balances the two: few levels need a narrow range,
    many clients a wide one.

    Args:
        levels: L, the largest word of a client.
    """
    deviations = max(MIN_RANGE, sqrt(log(n_max * levels**2)) - RANGE_OFFSET)
    return deviations * clip / sqrt(max(size, 1))


def quantize(values: NDArray[np.float32], bound: float, levels: int, seed: int) -> NDArray[np.uint32]:
    """Rounds finite values, clipped to ±bound, stochastically to words in 0..L.

    Args:
        values: shape (count,), finite.
        bound: R > 0.
        levels: L, 1 to 511, so that every multiple of L/2 in fixed point is exact in float32.
        seed: private seed of this client for this segment and round; clients with the same seed make the same errors.

    Returns:
        uint32, shape (count,), every word at most L.
    """
    top = np.float32(levels << DITHER_BITS)
    middle = np.float32((levels << DITHER_BITS) / 2)
    scale = np.float32((levels << DITHER_BITS) / (2 * bound))
    stream = open_stream(seed, "dither")
    words = np.empty(values.size, dtype=np.uint32)
    for start in range(0, values.size, _PIECE):
        fixed = values[start : start + _PIECE] * scale
        fixed += middle
        np.clip(fixed, np.float32(0), top, out=fixed)
        word = words[start : start + _PIECE]
        np.copyto(word, fixed, casting="unsafe")
        word += draw_uint16(stream, word.size)
        word >>= DITHER_BITS
    return words


def dequantize_sum(words: NDArray[np.uint32], bound: float, levels: int, contributions: int) -> NDArray[np.float32]:
    """Returns δ·Σu - n·R for sums of n = `contributions` words, as (2·Σu - n·L)·(R/L): exact up to the last product."""
    unit = bound / levels
    values = np.empty(words.size, dtype=np.float32)
    for start in range(0, words.size, _PIECE):
        centred = 2 * words[start : start + _PIECE].astype(np.int64) - contributions * levels
        values[start : start + _PIECE] = centred * unit
    return values


def relative_step(deviation: float, bits: int) -> np.float32:
    """Returns δ = 2κσ/(2^b - 1) for values of root mean square σ and b in 2 to 8; at least MIN_STEP."""
    if not MIN_STEP_BITS <= bits <= MAX_STEP_BITS:
        raise ValueError(f"bits lie in {MIN_STEP_BITS} to {MAX_STEP_BITS}, got {bits}")
    return np.float32(max(2 * STEP_RANGE * deviation / ((1 << bits) - 1), MIN_STEP))


def nearest_levels(values: NDArray[np.float32], step: np.float32) -> NDArray[np.int32]:
    """Returns round(x/δ), ties to even, clipped to ±MAX_LEVEL; int32, shape (count,)."""
    levels = np.empty(values.size, dtype=np.int32)
    for start in range(0, values.size, _PIECE):
        scaled = values[start : start + _PIECE] / step
        np.rint(scaled, out=scaled)
        np.clip(scaled, -MAX_LEVEL, MAX_LEVEL, out=scaled)
        levels[start : start + _PIECE] = scaled
    return levels


def dithered_levels(values: NDArray[np.float32], step: np.float32, seed: int) -> NDArray[np.int32]:
    """Returns round(x/δ + U - 1/2), clipped to ±MAX_LEVEL; int32, shape (count,)."""
    stream = open_stream(seed, "dither")
    levels = np.empty(values.size, dtype=np.int32)
    for start in range(0, values.size, _PIECE):
        piece = values[start : start + _PIECE]
        shifted = piece / step
        shifted += _dither(stream, piece.size)
        np.rint(shifted, out=shifted)
        np.clip(shifted, -MAX_LEVEL, MAX_LEVEL, out=shifted)
        levels[start : start + _PIECE] = shifted
    return levels


def dithered_values(levels: NDArray[np.int32], step: np.float32, seed: int) -> NDArray[np.float32]:
    """Returns δ·(level - (U - 1/2)) with the U of `dithered_levels`; float32, shape (count,)."""
    stream = open_stream(seed, "dither")
    values = levels.astype(np.float32)
    for start in range(0, values.size, _PIECE):
        values[start : start + _PIECE] -= _dither(stream, min(_PIECE, values.size - start))
    values *= step
    return values


def _dither(stream: np.random.SFC64, count: int) -> NDArray[np.float32]:
    """Draws the next values of U - 1/2, multiples of 2^-DITHER_BITS in [-1/2, 1/2), exact in float32."""
    drawn = draw_uint16(stream, count).astype(np.float32)
    drawn *= np.float32(2.0**-DITHER_BITS)
    drawn -= np.float32(0.5)
    return drawn


def levels_to_values(levels: NDArray[np.int32], step: np.float32) -> NDArray[np.float32]:
    """Returns δ·level, elementwise, so that every machine gets the same bits."""
    values = levels.astype(np.float32)
    values *= step
    return values
