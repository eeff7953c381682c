"""Linear layers whose frozen weight stays packed and is unpacked for each product.

    y = x Ŵᵀ + bias

The formats (nf4.py, int4.py) each have a frozen dataclass of tensors and the shape (d_out, d_in), and functions
from it to the dense Ŵ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix; each format adds its tensors as fields.

    Args:
        shape: (d_out, d_in).
        codes: uint8, the numbers' codes.
    """

    shape: tuple[int, int]
    codes: Tensor

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of the fields that are tensors."""
        return [field.name for field in fields(cls) if field.name != "shape"]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self.names()}

    def to(self, device: torch.device | str) -> Self:
        """Returns the same weight on a device."""
        return type(self)(self.shape, **{name: tensor.to(device) for name, tensor in self.tensors.items()})


Weight = TypeVar("Weight", bound=PackedWeight)


class PackedLinear(nn.Linear, Generic[Weight]):
    """A linear layer that acts as an `nn.Linear`, except that `weight` is None.

    Args:
        weight: the matrix; its tensors become buffers of this layer.
        unpack: returns the dense weight in the wanted dtype.
    """

    def __init__(
        self, weight: Weight, bias: Tensor | None, dtype: torch.dtype, unpack: Callable[[Weight, torch.dtype], Tensor]
    ) -> None:
        nn.Module.__init__(self)
        self._kind, self._unpack = type(weight), unpack
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def qweight(self) -> Tensor:
        """The codes, where peft looks for the device of a quantized layer."""
        return self.packed.codes

    @property
    def packed(self) -> Weight:
        """The weight, on this layer's device."""
        shape = (self.out_features, self.in_features)
        return self._kind(shape, **{name: self.get_buffer(name) for name in self._kind.names()})

    def dense(self) -> Tensor:
        """Returns Ŵ in the dtype of the arithmetic."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Returns Ŵ, (d_out, d_in), on this layer's device."""
        return self._unpack(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x: (..., d_in) -> (..., d_out)."""
        return cast(Tensor, _UnpackedProduct.apply(x, self))  # type: ignore[no-untyped-call]


def dense_weight(layer: nn.Linear) -> Tensor:
    """Returns the weight of a frozen layer, (d_out, d_in), which a packed one unpacks for this call."""
    return layer.dense() if isinstance(layer, PackedLinear) else layer.weight


class _UnpackedProduct(torch.autograd.Function):
    """Unpacks once forward and once backward, so that autograd never holds a dense weight in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear[Any]) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dense(), None
