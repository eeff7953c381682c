"""A base model with one adapter attached: one flat float32 tensor, of which every trained matrix is a view.

    model = adapt(base, job.adapter)
    model.load(vector)          # swaps the adapter: one copy
    vector = model.vector()
    with model.side_by_side(adapters, rows): ...    # many adapters at once in place of the one

The kinds of adapters are in `fedtune.model.lora` and `fedtune.model.core_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Factor, Factors, Vector
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.job.settings import AdapterSettings
from fedtune.model.base_model import BaseModel, check_linear, linear_modules
from fedtune.model.core_adapter import attach_core, reference_weight
from fedtune.model.lora import attach_lora
from fedtune.model.loss import LanguageModelHead
from fedtune.model.shape import adapted_modules
from fedtune.model.side_by_side_layers import CurrentRows, ManyAdapters, core_side_by_side, lora_side_by_side

Layout = TypeVar("Layout", bound=AdapterLayout)
Attach = Callable[[Any, Layout, Tensor, Tensor], Mapping[Factor, Sequence[nn.Parameter]]]
"""Adds an adapter's layers to a network: (network, layout, values, gradients) -> the parameters of each factor.

Values and gradients are flat tensors, float32, (layout.size,), and the parameters are views of them.
"""

Multiply = Callable[[Any, Layout, ManyAdapters, CurrentRows], Mapping[str, nn.Module]]
"""Makes layers of many adapters: (network, layout, adapters, rows) -> a layer in place of each adapted one, by name."""


class AdaptedModel:
    """A base model with one adapter attached, whose values are swapped in place.

    Args:
        base: base model, which must not be adapted a second time.
        layout: layout of the flat vector.
        attach: adds the layers of this kind of adapter.
        multiply: makes layers of many adapters of this kind.
    """

    def __init__(self, base: BaseModel, layout: Layout, attach: Attach[Layout], multiply: Multiply[Layout]) -> None:
        self.base = base
        self.layout: AdapterLayout = layout
        self.parameters = torch.zeros(layout.size, dtype=torch.float32, device=base.device)
        self.gradient = torch.zeros_like(self.parameters)
        self._factors = attach(base.network, layout, self.parameters, self.gradient)
        self._multiply = partial(multiply, base.network, layout)
        base.network.requires_grad_(False)
        self.train_factors(layout.factors)

    @cached_property
    def lm_head(self) -> LanguageModelHead:
        """The head of this architecture, from tokens to logits."""
        return LanguageModelHead(self.base)

    def load(self, vector: Vector) -> None:
        """Copies the adapter's values from a flat vector, float32, (layout.size,)."""
        self.layout.check(vector)
        self.parameters.copy_(torch.from_numpy(vector))

    def vector(self) -> Vector:
        """Returns a copy of the adapter's values, float32, (layout.size,)."""
        copy: Vector = self.parameters.detach().to("cpu", copy=True).numpy()
        return copy

    def matrices(self, factors: Factors) -> list[nn.Parameter]:
        """Returns the matrices of the named factors, which are views of `parameters`."""
        return [each for letter, parameters in self._factors.items() if letter in factors for each in parameters]

    def train_factors(self, factors: Factors) -> None:
        """Enables gradients for the named factors only; `gradient` accumulates them."""
        for letter, parameters in self._factors.items():
            for parameter in parameters:
                parameter.requires_grad_(letter in factors)

    @contextmanager
    def side_by_side(self, adapters: ManyAdapters, rows: CurrentRows) -> Iterator[Mapping[str, nn.Module]]:
        """Puts layers of many adapters in the places of the adapted ones, and the latter back afterwards.

        Yields:
            The layers by name.
        """
        many = self._multiply(adapters, rows)
        network = self.base.network
        ones = {name: network.get_submodule(name) for name in many}
        try:
            for name, layer in many.items():
                network.set_submodule(name, layer)
            yield many
        finally:
            for name, layer in ones.items():
                network.set_submodule(name, layer)


def adapt(base: BaseModel, settings: AdapterSettings) -> AdaptedModel:
    """Attaches an adapter, all zeros, to the base model.

    Raises:
        ModelError: a target matches no linear layer; the message lists the existing names. Or one is no plain linear
            layer, or the rank of a core adapter is over the smaller side of a layer.
    """
    if settings.kind == "core":
        return AdaptedModel(base, _core_layout(base, settings), attach_core, core_side_by_side)
    return AdaptedModel(base, _lora_layout(base, settings), attach_lora, lora_side_by_side)


def adapter_layout(base: BaseModel, settings: AdapterSettings) -> AdapterLayout:
    """Returns the layout of the adapter that `adapt` would attach; raises as it does."""
    return _core_layout(base, settings) if settings.kind == "core" else _lora_layout(base, settings)


def _lora_layout(base: BaseModel, settings: AdapterSettings) -> LoraLayout:
    return LoraLayout(_modules(base, settings), settings.rank, settings.alpha)


def _core_layout(base: BaseModel, settings: AdapterSettings) -> CoreLayout:
    layers = dict(linear_modules(base.network))
    modules = _modules(base, settings)
    return CoreLayout.between(modules, settings.rank, settings.alpha, lambda name: reference_weight(layers[name]))


def _modules(base: BaseModel, settings: AdapterSettings) -> tuple[AdaptedModule, ...]:
    layers = dict(linear_modules(base.network))
    linear = [AdaptedModule(name, layer.in_features, layer.out_features) for name, layer in layers.items()]
    chosen = adapted_modules(linear, settings)
    for module in chosen:
        check_linear(module.name, layers[module.name])
    return chosen
