"""The layers of K adapters on one base model, so that K clients' examples go through the frozen weights in one pass.

    with model.side_by_side(adapters, rows):               # values and gradients of K adapters
        rows.rows = PaddedRows.of([2, 1], device)          # or Stretches(batch.stretches): whose each token is
        losses = target_losses(model.lm_head, batch)

Per adapted layer with the inputs x_g of shape (n, d_in) of block g, whose client is k:

    y_g = x_g Wᵀ + s (x_g A_kᵀ) B_kᵀ                LoRA
    y_g = x_g Wᵀ + s ((x_g Aᵀ) R_kᵀ) Bᵀ             core: A and B are all clients', so that R alone differs

A block is one or several rows of a padded batch, and the products are batched over (G, n, R); without padding it is all
that a client has, n differs, and each client has a product of its own.

Nothing in a layer mixes blocks: values of one client that are not finite reach no other client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdapterLayout, Extent, Factor
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.model.packed import dense_weight


class MixedRowsError(RuntimeError):
    """A layer's input is not of as many tokens as the batch, as that of a mixture's experts."""


class ClientRows(Protocol):
    """The clients of a batch's tokens, which lie client after client, and products with the factors of each.

    The products take values as `split` returns them, and factors as `spread` does; sums are one for each client.
    """

    def split(self, values: Tensor) -> Tensor:
        """Returns the values (..., d) of all tokens for the products; a view of those that are contiguous.

        Raises:
            MixedRowsError: they are of other tokens than the batch's.
        """
        ...

    def spread(self, factors: Tensor) -> Tensor:
        """Returns the factors of the clients, (K, m, n), for the products."""
        ...

    def times(self, values: Tensor, factors: Tensor) -> Tensor:
        """Returns x F of each token's values x and its client's factor F."""
        ...

    def add_times(self, sums: Tensor, values: Tensor, factors: Tensor, scaling: float = 1.0) -> None:
        """Adds s x F of each token's values x and its client's factor F to its sum."""
        ...

    def add_outer(self, sums: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
        """Adds s Lᵀ R of each client's values L, (tokens, m), and R, (tokens, n), to its sum in (K, m, n)."""
        ...


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """The clients of a padded batch's rows.

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
    def of(cls, counts: Sequence[int], device: torch.device) -> PaddedRows:
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
        """Returns the values (B, length, d) or (B · length, d) as (G, n, d)."""
        if values.shape[0] % self.rows or (values.dim() == 3 and values.shape[0] != self.rows):
            raise MixedRowsError(f"a layer's input has the shape {tuple(values.shape)}; the batch has {self.rows} rows")
        return values.reshape(self.blocks, -1, values.shape[-1])

    def spread(self, factors: Tensor) -> Tensor:
        """Returns the factors (K, ...) of the clients as those of the blocks, (G, ...)."""
        return factors if self.owners is None else factors.index_select(0, self.owners)

    def times(self, values: Tensor, factors: Tensor) -> Tensor:
        """Multiplies (G, n, a) by (G, a, b)."""
        return torch.bmm(values, factors)

    def add_times(self, sums: Tensor, values: Tensor, factors: Tensor, scaling: float = 1.0) -> None:
        """Multiplies (G, n, a) by (G, a, b) and adds to (G, n, b)."""
        sums.baddbmm_(values, factors, alpha=scaling)

    def add_outer(self, sums: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
        """Adds the products of the blocks in their order."""
        sums.add_(self.collect(torch.bmm(left.mT, right)), alpha=scaling)

    def collect(self, gradients: Tensor) -> Tensor:
        """Returns the sums (K, ...) of the blocks' gradients (G, ...), added in the blocks' order."""
        if self.owners is None:
            return gradients
        return torch.segment_reduce(gradients.float(), "sum", lengths=self.lengths, axis=0, unsafe=True)


@dataclass(frozen=True, eq=False)
class Stretches:
    """The clients of a row without padding, of which each has a stretch.

    Args:
        lengths: tokens of each client's stretch, K of them, 0 for a client that has none.
    """

    lengths: Sequence[int]

    def split(self, values: Tensor) -> Tensor:
        """Returns the values (1, T, d) or (T, d) as (T, d)."""
        tokens = sum(self.lengths)
        if values.numel() != tokens * values.shape[-1]:
            shape = tuple(values.shape)
            raise MixedRowsError(f"a layer's input has the shape {shape}; the batch has {tokens} tokens")
        return values.reshape(tokens, values.shape[-1])

    def spread(self, factors: Tensor) -> Tensor:
        """Returns the factors as they are."""
        return factors

    def times(self, values: Tensor, factors: Tensor) -> Tensor:
        """Multiplies (T, a) by the (a, b) of each stretch's client."""
        product = values.new_empty(len(values), factors.shape[2])
        for rows, own, factor in self._each(values, product, clients=factors):
            torch.mm(rows, factor, out=own)
        return product

    def add_times(self, sums: Tensor, values: Tensor, factors: Tensor, scaling: float = 1.0) -> None:
        """Multiplies (T, a) by the (a, b) of each stretch's client and adds to (T, b)."""
        for rows, own, factor in self._each(values, sums, clients=factors):
            own.addmm_(rows, factor, alpha=scaling)

    def add_outer(self, sums: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
        """Adds each stretch's product."""
        for one, other, own in self._each(left, right, clients=sums):
            own.add_(one.T @ other, alpha=scaling)

    def _each(self, *values: Tensor, clients: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yields the values of each stretch that is not empty, and what its client has."""
        used = [index for index, length in enumerate(self.lengths) if length]
        yield from zip(
            *(torch.split(each, [self.lengths[index] for index in used]) for each in values),
            (clients[index] for index in used),
            strict=True,
        )


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
        inputs = (x, self.base_layer, self.lora_a, self.lora_b, self.scaling, self._rows.now())
        return cast(Tensor, _ManyAdaptedProducts.apply(*inputs))  # type: ignore[no-untyped-call]


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
        inputs = (x, self.base_layer, self.cores, *self._fixed, self.scaling, self._rows.now())
        return cast(Tensor, _ManyCoreProducts.apply(*inputs))  # type: ignore[no-untyped-call]


class _ManyAdaptedProducts(torch.autograd.Function):
    """The product of `fedtune.model.lora` and its gradients, with A_k and B_k for each block.

    It adds the gradients of the factors to where they are kept: autograd itself would want them dense.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scaling: float, rows: ClientRows
    ) -> Tensor:
        inputs = rows.split(x)
        a, b = rows.spread(lora_a.to(x.dtype)), rows.spread(lora_b.to(x.dtype))
        thin = rows.times(inputs, a.mT)
        ctx.save_for_backward(inputs, thin, a, b)
        ctx.base, ctx.scaling, ctx.rows, ctx.gradients = base, scaling, rows, (lora_a.grad, lora_b.grad)
        total = nn.functional.linear(x, dense_weight(base), base.bias)
        rows.add_times(rows.split(total), thin, b.mT, scaling)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, thin, a, b = ctx.saved_tensors
        rows: ClientRows = ctx.rows
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        split = rows.split(gradient)
        by_a, by_b = ctx.gradients
        to_x = None
        if needs_x or needs_a:
            thin_gradient = rows.times(split, b).mul_(ctx.scaling)
        if needs_x:
            to_x = gradient @ dense_weight(ctx.base)
            rows.add_times(rows.split(to_x), thin_gradient, a)
        if needs_a:
            rows.add_outer(by_a, thin_gradient, inputs)
        if needs_b:
            rows.add_outer(by_b, split, thin, ctx.scaling)
        return to_x, None, None, None, None, None


class _ManyCoreProducts(torch.autograd.Function):
    """The product of `fedtune.model.core_adapter` and its gradients, with R_k for each block; as above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear,
        cores: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        rows: ClientRows,
    ) -> Tensor:
        held = rows.spread(cores.to(x.dtype))
        inputs = x.reshape(-1, x.shape[-1])
        thin = rows.split(inputs @ lora_a.T)
        ctx.save_for_backward(thin, held, lora_a, lora_b)
        ctx.base, ctx.scaling, ctx.rows, ctx.gradient = base, scaling, rows, cores.grad
        turned = rows.times(thin, held.mT).view(-1, held.shape[1])
        total = nn.functional.linear(inputs, dense_weight(base), base.bias)
        return total.addmm_(turned, lora_b.T, alpha=scaling).view(*x.shape[:-1], lora_b.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        thin, held, lora_a, lora_b = ctx.saved_tensors
        rows: ClientRows = ctx.rows
        needs_x, _, needs_cores, *_ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        thin_gradient = rows.split((flat @ lora_b).mul_(ctx.scaling))
        to_x = None
        if needs_x:
            turned = rows.times(thin_gradient, held).view(-1, held.shape[2])
            to_x = (flat @ dense_weight(ctx.base)).addmm_(turned, lora_a)
            to_x = to_x.view(*gradient.shape[:-1], lora_a.shape[1])
        if needs_cores:
            rows.add_outer(ctx.gradient, thin_gradient, thin)
        return to_x, None, None, None, None, None, None
