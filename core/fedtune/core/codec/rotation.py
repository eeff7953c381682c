"""The randomized Hadamard rotation, which spreads a vector's energy evenly, so that one public range fits all values.

    y = H·D·x / √d     per block of d coordinates, D = diag(±1) from the public seed, H the d×d Hadamard matrix

y has the norm of x, and its coordinates are close to normally distributed with variance ‖block‖²/d for any x (Ailon and
Chazelle 2009; Suresh et al., "Distributed mean estimation with limited communication", 2017). H·H = d·I, so the inverse
is the same transform followed by D.

The vector is laid out row by row as a matrix of d rows, and every *column* is a block. Coordinates of a block are
therefore far apart in the adapter, which evens out the blocks' energies, and each butterfly works on long rows. Only
elementwise additions and products are used, in a fixed order, so the result is the same on every machine.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.seeds import draw_signs, open_stream

MAX_BLOCK = 1024
MAX_PADDING = 1 / 32  # share of the vector; padding travels, so a short vector gets smaller blocks instead

_PIECE_VALUES = 1 << 16  # values transformed at a time: 256 KiB, a core's second-level cache


def block_size(count: int) -> int:
    """Returns the largest power of two up to MAX_BLOCK with which `count` values need at most MAX_PADDING."""
    block = MAX_BLOCK
    while block > 1 and -count % block > count * MAX_PADDING:
        block //= 2
    return block


def rotated_size(count: int) -> int:
    """Returns the length of a rotated vector of `count` coordinates: the next multiple of its block size."""
    return count + -count % block_size(count)


def rotate(vector: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Returns H·D·x/√d, blockwise; float32 of shape (rotated_size(count),)."""
    block = block_size(vector.size)
    rotated = np.zeros(rotated_size(vector.size), dtype=np.float32)
    rotated[: vector.size] = vector
    matrix = rotated.reshape(block, -1)
    signs = _signs(block, seed)
    for piece in _columns(matrix):
        work = piece * signs
        _hadamard(work)
        piece[:] = work
    return rotated


def unrotate(rotated: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Returns D·H·y/√d, blockwise: the inverse of `rotate` up to float rounding; float32 of shape (count,)."""
    if rotated.shape != (rotated_size(count),):
        raise ValueError(f"{count} coordinates rotate into {rotated_size(count)}, got shape {rotated.shape}")
    block = block_size(count)
    vector = rotated.copy()
    signs = _signs(block, seed)
    for piece in _columns(vector.reshape(block, -1)):
        work = np.ascontiguousarray(piece)
        _hadamard(work)
        np.multiply(work, signs, out=piece)
    return vector[:count]


def _signs(block: int, seed: int) -> NDArray[np.float32]:
    """Returns the diagonal of D/√d as a column."""
    return draw_signs(open_stream(seed, "rotation"), block)[:, None] * np.float32(1 / sqrt(block))


def _columns(matrix: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    width = max(1, _PIECE_VALUES // matrix.shape[0])
    return [matrix[:, start : start + width] for start in range(0, matrix.shape[1], width)]


def _hadamard(matrix: NDArray[np.float32]) -> None:
    """Applies the Walsh-Hadamard transform to each column, in place, in natural order, in log2(rows) rounds."""
    rows = matrix.shape[0]
    half = 1
    while half < rows:
        pairs = matrix.reshape(rows // (2 * half), 2, -1)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = upper - lower
        upper += lower
        lower[:] = difference
        half *= 2
