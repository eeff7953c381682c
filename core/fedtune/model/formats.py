"""The formats that a base's weights can be quantized to, by the name that a job gives them.

FORMATS["int4"].quantize(weight)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.model import int4, nf4

_HEAD_ROWS = 4096


@dataclass(frozen=True)
class Format:
    """A format of frozen weights.

    Args:
        recipe: the sentence about it that enters the base's digest; it changes whenever the values do.
        quantize: packs a matrix of shape (d_out, d_in).
        quantizes_on: whether it gives on a type of device the bits that it gives on the CPU.
        dequantize: returns the dense matrix in a dtype; the reference.
        unpack: the same values, in the fastest way that works on the device.
        head_values: returns the values of the head, and so of the embedding where the two are tied.
    """

    recipe: str
    quantize: Callable[[Tensor], Any]
    quantizes_on: Callable[[str], bool]
    dequantize: Callable[[Any, torch.dtype], Tensor]
    unpack: Callable[[Any, torch.dtype], Tensor]
    head_values: Callable[[Tensor, torch.dtype], Tensor]


def _on_cpu(device_type: str) -> bool:
    return device_type == "cpu"


def _original_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype)


def _served_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds the largest matrix of many models, hence in pieces."""
    parts = (int4.quantize(rows, int4.HEAD_BITS) for rows in torch.split(weight, _HEAD_ROWS))
    return torch.cat([int4.dequantize(part, dtype) for part in parts])


FORMATS: Mapping[str, Format] = {
    "nf4": Format(nf4.RECIPE, nf4.quantize, nf4.quantizes_alike, nf4.dequantize, nf4.unpack_fastest, _original_head),
    "int4": Format(int4.RECIPE, int4.quantize, _on_cpu, int4.dequantize, int4.dequantize, _served_head),
}
