"""The 4-bit grid of onnxruntime's product MatMulNBits, filled with least squared error.

Each row of a weight W, (d_out, d_in), is cut into blocks of 32 along d_in; the last one is filled up with zeros. Per
block, with scale s and zero point z:

    Ŵ_i = s · (q_i - z)          q_i, z in 0 … 2^bits - 1: zero itself is always a level
    q_i = the level nearest to W_i / s + z

    4 bits: 5.125 bits a number with float32 scales          8 bits, for the head: 9.25

The search tries several steps span / k, k around 2^bits - 1: larger k cut off the block's ends for a finer grid. For a
step's codes d = q - z the best scale is Σ h·W·d / Σ h·d², which leaves the error Σ h·W² - (Σ h·W·d)² / Σ h·d²; the step
with the least error wins. h weighs the columns of W, for example by the mean square of their inputs (as in AWQ, Lin
et al. 2024); without it all count the same.

A base that is quantized so is quantized again by every device, so the bits must not depend on the machine: every
operation is an elementwise one of IEEE float32, and sums over a block are taken in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune.core.errors import ModelError
from fedtune.model.packed import PackedWeight

RECIPE = (
    "int4, asymmetric blocks of 32 along the input, least squares over five steps, all linear layers; the head in 8 "
    "bits likewise"
)
BLOCK = 32
HEAD_BITS = 8
STEPS = {4: (14, 15, 16, 17, 18), 8: (255,)}
"""Numbers k of steps between a block's least and largest value, zero included, that the search tries."""
KEEPING = {4: tuple(range(1, 14)), 8: (252, 253, 254)}
"""Further k for a weight that may lie on a grid already, whose blocks need not use all levels."""
_SMALLEST_SPAN = 1e-30  # a block that spans less becomes zeros
_ON_GRID = 1e-4  # of a step: float32's rounding of 255 steps is 1.5e-5
_ROWS_AT_ONCE = 1 << 13  # blocks that are searched together, so that they stay in the processor's cache
_DAMPING = 0.01  # share of the mean weight that is added to each column's


@dataclass(frozen=True)
class GridWeight(PackedWeight):
    """A quantized matrix, its bytes laid out as MatMulNBits takes them.

    Args:
        codes: uint8, (d_out, blocks, 4 · bits): a block's codes in order; of 4 bits two a byte, the first in the lower
            half.
        scales: float32, (d_out, blocks).
        zeros: uint8, (d_out, ceil(blocks · bits / 8)): the zero points of a row, packed in the same way.
    """

    scales: Tensor
    zeros: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.codes.shape[2] * 8 // BLOCK


def quantize(weight: Tensor, bits: int = 4, *, importance: Tensor | None = None, keep: bool = False) -> GridWeight:
    """Packs a matrix of shape (d_out, d_in) and any float dtype, on the CPU.

    Args:
        bits: 4 or 8.
        importance: float, (d_in,): non-negative weights of the columns' squared errors; None for equal ones.
        keep: whether blocks that lie on a grid already, up to float32's rounding, keep their values.

    Raises:
        ModelError: a weight is not finite.
    """
    d_out, d_in = weight.shape
    blocks = -(-d_in // BLOCK)
    padded = nn.functional.pad(weight.detach().cpu().float(), (0, blocks * BLOCK - d_in)).reshape(-1, BLOCK)
    columns = None if importance is None else _column_weights(importance, blocks)
    steps = STEPS[bits] + (KEEPING[bits] if keep else ())
    codes = torch.empty_like(padded, dtype=torch.uint8)
    scales, zeros = torch.empty(len(padded)), torch.empty(len(padded), dtype=torch.uint8)
    stride = max(1, _ROWS_AT_ONCE // blocks) * blocks  # whole rows, since the columns' weights repeat with them
    for begin in range(0, len(padded), stride):
        part = slice(begin, min(begin + stride, len(padded)))
        count = part.stop - part.start
        h = None if columns is None else columns.repeat(1, count // blocks)
        # Transposed, (32, blocks), so that sums over a block are sums of rows.
        found = _search(padded[part].T.contiguous(), h, steps, 2**bits - 1, keep)
        codes[part], scales[part], zeros[part] = found[0].T, found[1], found[2]
    shape, by_row = (d_out, d_in), (d_out, blocks)
    return pack(shape, codes.reshape(*by_row, BLOCK), scales.reshape(by_row), zeros.reshape(by_row), bits)


def pack(shape: tuple[int, int], codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> GridWeight:
    """Packs codes (d_out, blocks, 32), scales (d_out, blocks) and zero points (d_out, blocks)."""
    return GridWeight(shape, _pack(codes, bits), scales, _pack(zeros, bits))


def zero_points(packed: GridWeight) -> Tensor:
    """Returns the zero points of the blocks: uint8, (d_out, blocks)."""
    return _unpack(packed.zeros, packed.bits, packed.scales.shape[1])


def dequantize(packed: GridWeight, dtype: torch.dtype) -> Tensor:
    """Returns Ŵ, (d_out, d_in), on the device of the codes; computed in float32, then rounded to the dtype."""
    d_out, d_in = packed.shape
    codes = _unpack(packed.codes, packed.bits, BLOCK).float()
    zeros = zero_points(packed).float()
    values = packed.scales[..., None] * (codes - zeros[..., None])
    return values.reshape(d_out, -1)[:, :d_in].to(dtype)


def _search(w: Tensor, h: Tensor | None, steps: tuple[int, ...], top: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w: (32, n) -> codes (32, n), scales (n,) and zero points (n,); h: weights of the shape of w, or None.

    With `keep`, a step of which all values of a block are multiples wins, whatever the errors of others: where one
    value outweighs the rest, float32's sums cannot tell them apart.
    """
    low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
    span = high - low
    if not bool(torch.isfinite(span).all()):
        raise ModelError("the base model has a weight that is not finite")
    empty = span < _SMALLEST_SPAN
    span = torch.where(empty, 1.0, span)
    u, middle = w / span, (low + high) / span
    weighted = u if h is None else u * h
    best, scale, zero = torch.full_like(span, -1.0), torch.ones_like(span), torch.zeros_like(span)
    for k in steps:
        z = ((top - middle * k) / 2).round().clamp(0, top)
        d = _nearest(u * k, z, top)
        cross = _block_sum(weighted * d)
        square = _block_sum(d * d if h is None else d * d * h).clamp(min=_SMALLEST_SPAN)
        gain = cross * cross / square
        if keep:
            gain = torch.where((u * k - d).abs().amax(0) < _ON_GRID, torch.inf, gain)
        better = gain > best
        best = torch.where(better, gain, best)
        scale, zero = torch.where(better, cross / square, scale), torch.where(better, z, zero)
    scale = scale * span
    codes = _nearest(w / torch.where(empty, 1.0, scale), zero, top) + zero
    return codes.to(torch.uint8), torch.where(empty, 0.0, scale), zero.to(torch.uint8)


def _nearest(levels: Tensor, zero: Tensor, top: int) -> Tensor:
    """Rounds to the nearest of the levels -z … top - z."""
    return torch.minimum(torch.maximum(levels.round(), -zero), top - zero)


def _block_sum(values: Tensor) -> Tensor:
    """(32, n) -> (n,), by halves: torch's own sum takes its terms in an order that depends on the processor."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def _column_weights(importance: Tensor, blocks: int) -> Tensor:
    """(d_in,) -> (32, blocks), scaled to a mean of 1 and damped; columns beyond d_in hold zeros and weigh nothing."""
    mean = importance.mean().clamp(min=_SMALLEST_SPAN)
    damped = importance.float() / mean + _DAMPING
    return nn.functional.pad(damped, (0, blocks * BLOCK - len(damped))).reshape(blocks, BLOCK).T.contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) codes -> (..., ceil(n · bits / 8)) bytes."""
    if bits == 8:
        return codes.contiguous()
    codes = nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undoes `_pack`."""
    if bits == 8:
        return packed
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :count]
