"""The layers of a core adapter. Per adapted layer with input x of shape (n, d_in):

    y = x Wᵀ + s ((x Aᵀ) Rᵀ) Bᵀ          s = alpha / sqrt(R), A: (R, d_in) and B: (d_out, R) fixed, R: (R, R)

LoRA-XS (Bałazy et al. 2024), with the fixed factors of `fedtune.core.adapter.fixed_factors`. Only the thin x Aᵀ is kept
for the backward pass, so a core adapter takes less memory for activations than LoRA, which keeps x.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import Factor, Vector
from fedtune.core.errors import ModelError
from fedtune.model.packed import PackedLinear, dense_weight


def attach_core(
    network: Any, layout: CoreLayout, values: Tensor, gradients: Tensor
) -> dict[Factor, list[nn.Parameter]]:
    """Adds R between the fixed factors of every adapted layer, as `fedtune.model.adapted_model.Attach` describes."""
    parameters = []
    for name, extent in layout.extents.items():
        core = nn.Parameter(values[extent.where].view(extent.shape))
        core.grad = gradients[extent.where].view(extent.shape)
        parent, _, leaf = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, leaf, CoreLinear(getattr(owner, leaf), layout.fixed.pairs[name], core, layout.scaling))
        parameters.append(core)
    return {"r": parameters}


def reference_weight(layer: nn.Linear) -> Vector:
    """Returns the weight from which fixed factors follow: the reference weight rounded to bfloat16, (d_out, d_in).

    Every form in which a device may hold the base, packed, in bfloat16 or in float32, gives the same bits.

    Raises:
        ModelError: the weight is held in float16, from which these bits do not follow.
    """
    if isinstance(layer, PackedLinear):
        weight = layer.unpacked(torch.bfloat16)
    elif layer.weight.dtype == torch.float16:
        raise ModelError(
            'adapter.kind = "core" derives factors from the base\'s weights, which fp16 rounds too early; expected '
            'training.weights = "packed", or training.precision = "fp32"'
        )
    else:
        weight = layer.weight.detach().to(torch.bfloat16)
    values: Vector = weight.float().cpu().numpy()
    return values


class CoreLinear(nn.Module):
    """A linear layer with a core adapter; R stays float32, the rest is in the input's dtype.

    Args:
        base_layer: the frozen layer.
        fixed: (A, B), float32.
        core: R, which is trained.
        scaling: s.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, base_layer: nn.Linear, fixed: tuple[Vector, Vector], core: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.core = core
        self.scaling = scaling
        dtype = base_layer.dtype if isinstance(base_layer, PackedLinear) else base_layer.weight.dtype
        for name, factor in zip(("lora_a", "lora_b"), fixed, strict=True):
            held = torch.from_numpy(np.ascontiguousarray(factor)).to(core.device, dtype)
            self.register_buffer(name, held, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x: (..., d_in) -> (..., d_out)."""
        inputs = (x, self.base_layer, self.core, self.lora_a, self.lora_b, self.scaling)
        return cast(Tensor, _CoreProduct.apply(*inputs))  # type: ignore[no-untyped-call]


class _CoreProduct(torch.autograd.Function):
    """y = x Wᵀ + s ((x Aᵀ) Rᵀ) Bᵀ (+ bias), and with G = ∂L/∂y and H = s G B:

    ∂L/∂x = G W + (H R) A,   ∂L/∂R = Hᵀ (x Aᵀ)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Linear, core: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        held = core.to(x.dtype)
        thin = rows @ lora_a.T
        ctx.save_for_backward(thin, held, lora_a, lora_b)
        ctx.base, ctx.scaling = base, scaling
        total = nn.functional.linear(rows, dense_weight(base), base.bias)
        return total.addmm_(thin @ held.T, lora_b.T, alpha=scaling).view(*x.shape[:-1], lora_b.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        thin, core, lora_a, lora_b = ctx.saved_tensors
        needs_x, _, needs_core, *_ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        thin_gradient = (flat @ lora_b).mul_(ctx.scaling)
        to_x = to_core = None
        if needs_x:
            to_x = (flat @ dense_weight(ctx.base)).addmm_(thin_gradient @ core, lora_a)
            to_x = to_x.view(*gradient.shape[:-1], lora_a.shape[1])
        if needs_core:
            to_core = (thin_gradient.T @ thin).float()
        return to_x, None, to_core, None, None, None
