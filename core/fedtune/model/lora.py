"""The layers of a LoRA adapter. Per adapted layer with input x of shape (n, d_in):

    y = x Wᵀ + s (x Aᵀ) Bᵀ          s = alpha / sqrt(R), A: (R, d_in), B: (d_out, R)

LoRA (Hu et al. 2021) with the rank-stabilised scaling of rsLoRA (Kalajdzievski 2023), attached by peft. The storage of
the values differs from peft's, and the layer is one operation.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn

from fedtune.core.adapter.layout import Factor
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.model.packed import dense_weight

_ADAPTER = "default"  # peft's name for the one adapter


def attach_lora(
    network: Any, layout: LoraLayout, values: Tensor, gradients: Tensor
) -> dict[Factor, list[nn.Parameter]]:
    """Adds A and B to every adapted layer, as `fedtune.model.adapted_model.Attach` describes."""
    config = LoraConfig(
        r=layout.rank,
        lora_alpha=layout.alpha,  # type: ignore[arg-type] # peft only divides it; a job may set 22.6
        use_rslora=True,
        target_modules=[module.name for module in layout.modules],
    )
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, network, _ADAPTER)
    parameters: dict[Factor, list[nn.Parameter]] = {"a": [], "b": []}
    for name, extents in layout.extents.items():
        layer = network.get_submodule(name)
        for letter, holder, extent in zip(parameters, (layer.lora_A, layer.lora_B), extents, strict=True):
            parameter = nn.Parameter(values[extent.where].view(extent.shape))
            parameter.grad = gradients[extent.where].view(extent.shape)
            holder[_ADAPTER].weight = parameter
            parameters[letter].append(parameter)
    return parameters


class AdaptedLinear(lora.Linear):
    """peft's adapted layer as one operation; factors stay float32, the rest is in the input's dtype.

    On one core a training step of the bundled model takes about 0.7 times as long as with peft's own forward method.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps x: (..., d_in) -> (..., d_out)."""
        lora_a, lora_b = self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight
        inputs = (x, self.base_layer, lora_a, lora_b, self.scaling[_ADAPTER])
        return cast(Tensor, _AdaptedProduct.apply(*inputs))  # type: ignore[no-untyped-call]


class _AdaptedProduct(torch.autograd.Function):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ (+ bias), and with G = ∂L/∂y and H = s G B:

        ∂L/∂x = G W + H A,   ∂L/∂A = Hᵀ x,   ∂L/∂B = s Gᵀ (x Aᵀ)

    This is one function instead of seven recorded operations: the low-rank products add to the large ones in place, the
    thin x Aᵀ is the only activation kept besides x, and a frozen factor costs nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        thin = rows @ a.T
        ctx.save_for_backward(rows, thin, a, b)
        ctx.base, ctx.scaling = base, scaling
        total = nn.functional.linear(rows, dense_weight(base), base.bias)
        return total.addmm_(thin, b.T, alpha=scaling).view(*x.shape[:-1], b.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, thin, a, b = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_x = to_a = to_b = None
        if needs_x or needs_a:
            thin_gradient = (flat @ b).mul_(ctx.scaling)
        if needs_x:
            to_x = (flat @ dense_weight(ctx.base)).addmm_(thin_gradient, a)
            to_x = to_x.view(*gradient.shape[:-1], a.shape[1])
        if needs_a:
            to_a = (thin_gradient.T @ rows).float()
        if needs_b:
            to_b = (flat.T @ thin).float().mul_(ctx.scaling)
        return to_x, None, to_a, to_b, None
