"""The layers of K adapters on one base model, so that K clients' examples go through the frozen weights in one pass.

    with model.side_by_side(values, gradients, rows):      # values: factor -> float32 (K, values of the factor)
        losses = target_losses(model.lm_head, batch)       # row block g of the batch has the factors of client rows[g]

Per adapted layer with the inputs x_g of shape (n, d_in) of block g, whose client is k:

    y_g = x_g Wᵀ + s (x_g A_kᵀ) B_kᵀ                LoRA: batched products over (G, n, R)
    y_g = x_g Wᵀ + s ((x_g Aᵀ) R_kᵀ) Bᵀ             core: A and B are all clients', so that R alone is batched

Nothing in a layer mixes blocks: values of one client that are not finite reach no other client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdapterLayout, Extent, Factor
from fedtune.core.adapter.lora_layout import LoraLayout


class MixedRowsError(RuntimeError):
    """A layer's input does not have the batch's rows in their order, as the experts of a mixture have it."""


@dataclass(frozen=True, eq=False)
class ClientRows:
    """The clients of a batch's rows, which lie client after client.

    Args:
        rows: B, rows of the batch.
        blocks: G, equal blocks of rows of which each belongs to one client.
        owners: int64, (G,): the client of each block; None where block k is client k's, for all K clients.
        lengths: int64, (K,): the number of blocks of each client.
    """

    rows: int
    blocks: int
    owners: Tensor | None
    lengths: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> ClientRows:
        """Returns the blocks of a batch with these numbers of rows, of which some may be 0, for each client.

        A client's rows are one block where all clients have equally many, and otherwise each row is a block.
        """
        used = [count for count in counts if count]
        blocks = [int(count > 0) for count in counts] if len(set(used)) == 1 else list(counts)
        lengths = torch.tensor(blocks, device=device)
        owners = None
        if set(blocks) != {1}:
            owners = torch.tensor([client for client, own in enumerate(blocks) for _ in range(own)], device=device)
        return cls(sum(counts), sum(blocks), owners, lengths)

    def split(self, values: Tensor) -> Tensor:
        """Returns the values (B, length, d) or (B · length, d) as (G, n, d).

        Raises:
            MixedRowsError: they have other rows than the batch.
        """
        if values.shape[0] % self.rows or (values.dim() == 3 and values.shape[0] != self.rows):
            raise MixedRowsError(f"a layer's input has the shape {tuple(values.shape)}; the batch has {self.rows} rows")
        return values.reshape(self.blocks, -1, values.shape[-1])

    def spread(self, factors: Tensor) -> Tensor:
        """Returns the factors (K, ...) of the clients as those of the blocks, (G, ...)."""
        return factors if self.owners is None else factors.index_select(0, self.owners)

    def collect(self, gradients: Tensor) -> Tensor:
        """Returns the sums (K, ...) of the blocks' gradients (G, ...), added in the blocks' order."""
        if self.owners is None:
            return gradients
        return torch.segment_reduce(gradients.float(), "sum", lengths=self.lengths, axis=0, unsafe=True)


@dataclass
class CurrentRows:
    """The rows of the pass that is computed, which all layers look at."""

    rows: ClientRows | None = None

    def now(self) -> ClientRows:
        """Returns the rows of the present pass."""
        assert self.rows is not None, "the rows of a pass are said before it is computed"
        return self.rows


@dataclass(frozen=True, eq=False)
class ManyAdapters:
    """The values of K adapters and their gradients.

    Args:
        values: factor -> float32, (K, values of the factor).
        gradients: the same for each factor that is trained; the others stay as they are.
    """

    values: Mapping[Factor, Tensor]
    gradients: Mapping[Factor, Tensor]

    def matrix(self, layout: AdapterLayout, factor: Factor, extent: Extent) -> nn.Parameter:
        """Returns all clients' matrices of one module, (K, *shape), as a view of the values."""
        offset = layout.segment(factor).start
        where = slice(extent.where.start - offset, extent.where.stop - offset)
        parameter = nn.Parameter(self.values[factor][:, where].view(-1, *extent.shape), requires_grad=False)
        if factor in self.gradients:
            parameter.requires_grad_()
            parameter.grad = self.gradients[factor][:, where].view(-1, *extent.shape)
        return parameter


def lora_side_by_side(
    network: Any, layout: LoraLayout, adapters: ManyAdapters, rows: CurrentRows
) -> dict[str, nn.Module]:
    """Returns a layer of many LoRA adapters for each layer that `fedtune.model.lora` adapted, by its name."""
    layers: dict[str, nn.Module] = {}
    for name, (a, b) in layout.extents.items():
        pair = (adapters.matrix(layout, "a", a), adapters.matrix(layout, "b", b))
        layers[name] = ManyLoraLinear(network.get_submodule(name).base_layer, pair, layout.scaling, rows)
    return layers


def core_side_by_side(
    network: Any, layout: CoreLayout, adapters: ManyAdapters, rows: CurrentRows
) -> dict[str, nn.Module]:
    """Returns a layer of many core adapters for each layer that `fedtune.model.core_adapter` adapted, by its name."""
    layers: dict[str, nn.Module] = {}
    for name, extent in layout.extents.items():
        one = network.get_submodule(name)
        cores = adapters.matrix(layout, "r", extent)
        layers[name] = ManyCoreLinear(one.base_layer, (one.lora_a, one.lora_b), cores, layout.scaling, rows)
    return layers


class ManyLoraLinear(nn.Module):
    """A linear layer with K LoRA adapters; factors stay float32, the rest is in the input's dtype.

    Args:
        base_layer: the frozen layer.
        factors: A, (K, R, d_in), and B, (K, d_out, R).
        scaling: s.
        rows: tells the rows of the present pass.
    """

    def __init__(
        self, base_layer: nn.Module, factors: tuple[nn.Parameter, nn.Parameter], scaling: float, rows: CurrentRows
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a, self.lora_b = factors
        self.scaling = scaling
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Maps x: (..., d_in) -> (..., d_out)."""
        inputs = (self.base_layer(x), x, self.lora_a, self.lora_b, self.scaling, self._rows.now())
        return cast(Tensor, _ManyLowRankSums.apply(*inputs))  # type: ignore[no-untyped-call]


class ManyCoreLinear(nn.Module):
    """A linear layer with K core adapters between one pair of fixed factors; the cores stay float32.

    Args:
        base_layer: the frozen layer.
        fixed: (A, B) in the dtype of the arithmetic.
        cores: R, (K, R, R).
        scaling: s.
        rows: tells the rows of the present pass.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        fixed: tuple[Tensor, Tensor],
        cores: nn.Parameter,
        scaling: float,
        rows: CurrentRows,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.cores = cores
        self.scaling = scaling
        self._fixed, self._rows = fixed, rows

    def forward(self, x: Tensor) -> Tensor:
        """Maps x: (..., d_in) -> (..., d_out)."""
        inputs = (self.base_layer(x), x, self.cores, *self._fixed, self.scaling, self._rows.now())
        return cast(Tensor, _ManyCoreSums.apply(*inputs))  # type: ignore[no-untyped-call]


class _ManyLowRankSums(torch.autograd.Function):
    """The sum of `fedtune.model.lora` and its gradients, with A_k and B_k for each block.

    It adds the gradients of the factors to where they are kept: autograd itself would want them dense.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, rows: ClientRows
    ) -> Tensor:
        inputs = rows.split(x)
        a, b = rows.spread(lora_a.to(x.dtype)), rows.spread(lora_b.to(x.dtype))
        thin = torch.bmm(inputs, a.mT)
        ctx.save_for_backward(inputs, thin, a, b)
        ctx.scaling, ctx.rows, ctx.gradients = scaling, rows, (lora_a.grad, lora_b.grad)
        return torch.baddbmm(rows.split(base), thin, b.mT, alpha=scaling).view(base.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, thin, a, b = ctx.saved_tensors
        rows: ClientRows = ctx.rows
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        split = rows.split(gradient)
        by_a, by_b = ctx.gradients
        to_x = None
        if needs_x or needs_a:
            thin_gradient = torch.bmm(split, b).mul_(ctx.scaling)
        if needs_x:
            to_x = torch.bmm(thin_gradient, a).view(*gradient.shape[:-1], a.shape[2])
        if needs_a:
            by_a.add_(rows.collect(torch.bmm(thin_gradient.mT, inputs)))
        if needs_b:
            by_b.add_(rows.collect(torch.bmm(split.mT, thin)), alpha=ctx.scaling)
        return gradient, to_x, None, None, None, None


class _ManyCoreSums(torch.autograd.Function):
    """The sum of `fedtune.model.core_adapter` and its gradients, with R_k for each block; as above."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        cores: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        rows: ClientRows,
    ) -> Tensor:
        held = rows.spread(cores.to(x.dtype))
        thin = rows.split(x.reshape(-1, x.shape[-1]) @ lora_a.T)
        ctx.save_for_backward(thin, held, lora_a, lora_b)
        ctx.scaling, ctx.rows, ctx.gradient = scaling, rows, cores.grad
        turned = torch.bmm(thin, held.mT).view(-1, held.shape[1])
        return torch.addmm(base.reshape(-1, base.shape[-1]), turned, lora_b.T, alpha=scaling).view(base.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        thin, held, lora_a, lora_b = ctx.saved_tensors
        rows: ClientRows = ctx.rows
        _, needs_x, needs_cores, *_ = ctx.needs_input_grad
        thin_gradient = rows.split((gradient.reshape(-1, gradient.shape[-1]) @ lora_b).mul_(ctx.scaling))
        to_x = None
        if needs_x:
            turned = torch.bmm(thin_gradient, held).view(-1, held.shape[2])
            to_x = (turned @ lora_a).view(*gradient.shape[:-1], lora_a.shape[1])
        if needs_cores:
            ctx.gradient.add_(rows.collect(torch.bmm(thin_gradient.mT, thin)))
        return gradient, to_x, None, None, None, None, None
