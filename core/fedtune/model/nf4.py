"""NF4 with double quantization: the same weights for all devices, independent of their hardware.

A weight W of n numbers is cut into blocks of 64, row-major. Per block k, with scale c_k = max |W|:

    q_i = index of the NF4 level nearest to W_i / c_k             4 bits a number
    u_k = index of the 8-bit level nearest to (c_k - m) / t_g     8 bits a block
    Ŵ_i = level[q_i] · (map[u_k] · t_g + m)                       in float32, then rounded to the arithmetic's dtype

with m the mean of all c and t_g = max |c - m| over a group of 256 blocks: 4.127 bits a number. QLoRA (Dettmers et al.
2023, section 3); the 8-bit levels are those of 8-bit Optimizers via Block-wise Quantization (Dettmers et al. 2022). The
byte layout is that of bitsandbytes.

Quantization always runs in this module, so that a base has the same values on every machine: on the CPU, or on a GPU
that computes a small matrix to the same bits. Its operations are rounded as IEEE 754 says on either, and the one sum is
taken on the CPU. bitsandbytes, where it works, unpacks faster than torch does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.core.errors import ModelError
from fedtune.model.packed import PackedWeight

RECIPE = "nf4, blocks of 64, scales in 8 bits in groups of 256, all linear layers but the head"
BLOCK = 64
GROUP = 256
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_CHUNK = 4096  # blocks that are quantized at once: what is computed on the way stays in a core's cache
_BINS = 256  # of values per unit, in which `_nearest_level` looks; no two midpoints between levels are in one
_SMALLEST_SCALE = 1e-38  # keeps a block of zeros from dividing by zero
_EXPONENTS = 7  # decades of the 8-bit map


@dataclass(frozen=True)
class NF4Weight(PackedWeight):
    """A quantized matrix.

    Args:
        codes: uint8, (ceil(n / 2),): two NF4 codes per byte, the first in the upper half.
        scale_codes: uint8, (blocks,).
        scale_steps: float32, (groups,): t_g.
        scale_mean: float32, (): m.
    """

    scale_codes: Tensor
    scale_steps: Tensor
    scale_mean: Tensor


Unpack = Callable[[NF4Weight, torch.dtype], Tensor]


def quantize(weight: Tensor) -> NF4Weight:
    """Packs a matrix of shape (d_out, d_in) and any float dtype, on its device.

    Raises:
        ModelError: a weight is not finite.
    """
    d_out, d_in = weight.shape
    size = _CHUNK * BLOCK if weight.device.type == "cpu" else max(weight.numel(), 1)
    parts = [_quantize_chunk(chunk) for chunk in torch.split(weight.detach().reshape(-1), size)]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    if not bool(torch.isfinite(scales).all()):
        raise ModelError("the base model has a weight that is not finite")
    codes = codes[: -(-d_out * d_in // 2)]
    if d_out * d_in % 2:
        codes[-1] &= 0xF0
    # In float64: a float32 mean would depend on how many threads share the sum.
    mean = torch.tensor(np.mean(scales.cpu().numpy(), dtype=np.float64), dtype=torch.float32, device=scales.device)
    groups = _cut(scales - mean, GROUP)
    steps = groups.abs().amax(dim=1)
    scale_codes = _nearest(groups / steps.clamp(min=_SMALLEST_SCALE)[:, None], scale_map().to(scales.device))
    return NF4Weight(
        (d_out, d_in),
        codes=codes,
        scale_codes=scale_codes.reshape(-1)[: scales.numel()],
        scale_steps=steps,
        scale_mean=mean,
    )


def dequantize(packed: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Returns Ŵ, (d_out, d_in), on the device of the codes, computed by torch, bit for bit as bitsandbytes does."""
    device = packed.codes.device
    count = math.prod(packed.shape)
    pairs, scale_levels = _pairs().to(device), scale_map().to(device)
    steps = packed.scale_steps.repeat_interleave(GROUP)[: packed.scale_codes.numel()]
    scales = scale_levels[packed.scale_codes.int()] * steps + packed.scale_mean
    levels = pairs[packed.codes.int()].view(torch.float32)[:count]
    blocks = _cut(levels, BLOCK) * scales[:, None]
    return blocks.reshape(-1)[:count].to(dtype).reshape(packed.shape)


def unpack_fastest(packed: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Does as `dequantize`, with bitsandbytes where that works."""
    # Where blocks span rows, bitsandbytes 0.50.2 gives wrong values on CPUs, for example for (64, 96).
    if packed.shape[1] % BLOCK == 0 and bitsandbytes_works(packed.codes.device.type):
        return bitsandbytes_dequantize(packed, dtype)
    return dequantize(packed, dtype)


@functools.cache
def scale_map() -> Tensor:
    """Returns the 256 levels of a scale: float32, sorted.

    Seven decades below 1, each with evenly spaced levels of either sign, 2^6 in the uppermost and half as many in each
    decade below; and 0 and 1.
    """
    levels = [0.0, 1.0]
    for decade in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        magnitudes = (10 ** (decade - _EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += magnitudes + [-magnitude for magnitude in magnitudes]
    return torch.tensor(sorted(levels), dtype=torch.float32)


@functools.cache
def bitsandbytes_works(device_type: str) -> bool:
    """Returns whether bitsandbytes unpacks on this kind of device.

    Its wheels can be imported and then fail at the first call (bitsandbytes issue 1930), so this makes a real call.
    """
    return unpacks_alike(bitsandbytes_dequantize, device_type)


@functools.cache
def quantizes_alike(device_type: str) -> bool:
    """Returns whether this kind of device packs a small matrix to the bits that the CPU packs it to."""
    weight = torch.linspace(-1, 1, 3 * GROUP * BLOCK + 5).sin()[:, None]
    try:
        packed = quantize(weight.to(device_type)).to("cpu")
    except Exception:  # as in `unpacks_alike`
        return False
    expected = quantize(weight)
    return all(torch.equal(packed.tensors[name], tensor) for name, tensor in expected.tensors.items())


def unpacks_alike(unpack: Unpack, device_type: str) -> bool:
    """Returns whether a function unpacks a small matrix on this kind of device to the same values as torch."""
    weight = torch.linspace(-1, 1, 3 * GROUP * BLOCK).sin().reshape(-1, 2 * BLOCK)
    packed = quantize(weight).to(device_type)
    try:
        return all(
            torch.equal(unpack(packed, dtype), dequantize(packed, dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        )
    except Exception:  # a broken native library may raise anything; the torch path is correct, only slower
        return False


def bitsandbytes_dequantize(packed: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Unpacks with bitsandbytes, which may fail or, where `bitsandbytes_works` says no, give other values."""
    operations = _bitsandbytes_operations()
    device = packed.codes.device
    scales = operations.dequantize_blockwise(
        packed.scale_codes, packed.scale_steps, scale_map().to(device), GROUP, torch.float32
    )
    scales += packed.scale_mean
    dense: Tensor = operations.dequantize_4bit(packed.codes[:, None], scales, BLOCK, "nf4", packed.shape, dtype)
    return dense


@functools.cache
def _bitsandbytes_operations() -> Any:
    import bitsandbytes  # noqa: F401  # registers its operations with torch

    return torch.ops.bitsandbytes


@functools.cache
def _pairs() -> Tensor:
    """Returns the two levels of each byte of codes, read as one number: int64, (256,)."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return torch.stack([levels.repeat_interleave(len(levels)), levels.repeat(len(levels))], dim=1).view(torch.int64)[
        :, 0
    ]


@functools.cache
def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns per bin of [-1, 1] the level below the first midpoint that is in or after it, and that midpoint."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    midpoints = torch.cat([(levels[:-1] + levels[1:]) / 2, torch.tensor([math.inf])])
    below = torch.bucketize(torch.arange(-_BINS, _BINS + 1) / _BINS, midpoints)
    return below.to(device, torch.uint8), midpoints[below].to(device)


def _quantize_chunk(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes of whole blocks of weights, the last one filled up with zeros, and the blocks' scales."""
    blocks = _cut(weights.float(), BLOCK)
    scales = blocks.abs().amax(dim=1)
    codes = _nearest_level(blocks / scales.clamp(min=_SMALLEST_SCALE)[:, None]).reshape(-1)
    return codes[::2] << 4 | codes[1::2], scales


def _nearest_level(values: Tensor) -> Tensor:
    """Does as `_nearest` with NF4's levels, several times as fast: a value's bin has at most one midpoint.

    Args:
        values: float32, from -1 to 1; the codes of NaN are of no use.
    """
    below, midpoints = _bins(values.device)
    bins = ((values + 1) * _BINS).int().clamp_(0, 2 * _BINS).reshape(-1)
    codes = below.index_select(0, bins) + (values.reshape(-1) > midpoints.index_select(0, bins))
    return codes.reshape(values.shape)


def _cut(values: Tensor, size: int) -> Tensor:
    """Reshapes (n,) -> (ceil(n / size), size), with the last row filled up with zeros."""
    missing = -values.numel() % size
    return nn.functional.pad(values, (0, missing)).reshape(-1, size)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8)
