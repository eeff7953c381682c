"""Attention on processors: in float32, and over examples that lie one after another without padding between them.

    places = Places.of([[7, 9], [12]])                       # lengths of a batch's examples, by client
    network(ids, position_ids=places.positions, attention_mask=NO_MASK, **{PLACES: places})

A step's examples differ in length: padded to the longest, a third of the demo's tokens are padding, which costs as much
as any other token in every linear layer. Without padding the T tokens of B examples are one row of the network's input.
Every layer but attention treats each token alone; attention moves its inputs to a few padded batches of examples of
similar length, so that there is little padding in each, and its outputs back.

    tokens (1, H, T, D) --pad--> (b, H, L, D) of each batch --causal attention--> (b, L, H, D) --unpad--> (1, T, H, D)

A place that needs no value has one of the same client, so that values that are not finite stay with theirs. Nothing may
use the states of tokens that belong to no example: the backward pass takes their gradients for zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fedtune.data.batches import row_starts

ATTENTION = "fedtune_attention"
"""The name of this attention for transformers."""

PLACES = "fedtune_places"
"""The keyword by which a network's forward pass hands the places of its tokens on to attention."""

NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""A mask of four dimensions, which transformers hands on as it is; without one it would compute its own."""


_EXAMPLES = 8  # at most, of a padded batch: fewer leave less padding, and take more calls; measured on the demo


@dataclass(frozen=True, eq=False)
class Places:
    """The places of the T tokens of a row in padded batches: P places, those of one batch after those of another.

    Args:
        shapes: (b, L) of each batch: b examples, of which the longest has L tokens.
        tokens: int64, (P,): the token at each place; after an example's end its last one.
        fillers: int64: the places after an example's end.
        places: int64, (T,): the place of each token; of one that belongs to no example, that of one of the same client.
        rest: int64: the tokens that belong to no example.
        positions: int64, (1, T): the index of each token in its example; 0 for the rest.
    """

    shapes: Sequence[tuple[int, int]]
    tokens: Tensor
    fillers: Tensor
    places: Tensor
    rest: Tensor
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> Places:
        """Returns the places of a row of examples of these lengths, by client, as `concatenate` makes it."""
        starts, stretches = row_starts(lengths)
        firsts, counts = np.array(starts), np.concatenate([np.array(own, np.int64) for own in lengths])
        places, positions = np.full(sum(stretches), -1), np.zeros(sum(stretches), np.int64)
        shapes, tokens, fillers = [], [], []
        before = 0
        number = max(min(2, len(counts)), -(-len(counts) // _EXAMPLES))
        for chosen in np.array_split(np.argsort(counts, kind="stable"), number):
            indices = np.arange(counts[chosen].max())
            real = (indices < counts[chosen, None]).reshape(-1)
            own = (firsts[chosen, None] + np.minimum(indices, counts[chosen, None] - 1)).reshape(-1)
            places[own[real]] = before + np.flatnonzero(real)
            positions[own[real]] = np.tile(indices, len(chosen))[real]
            shapes.append((len(chosen), len(indices)))
            tokens.append(own)
            fillers.append(before + np.flatnonzero(~real))
            before += len(own)
        rest = np.flatnonzero(places < 0)
        owners = np.repeat(np.cumsum(stretches) - stretches, stretches)  # the first token of each token's client
        places[rest] = places[owners[rest]]
        arrays = (np.concatenate(tokens), np.concatenate(fillers), places, rest, positions[None])
        return cls(shapes, *map(torch.from_numpy, arrays))

    def pad(self, rows: Tensor) -> Tensor:
        """Moves rows (T, H, D) to their places: float32, (P, H, D)."""
        return rows.index_select(0, self.tokens).float()

    def unpad(self, batches: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Moves the values (b, L, H, D) of the batches to rows of another dtype, (T, H, D)."""
        padded = torch.empty(len(self.tokens), *batches[0].shape[2:], dtype=dtype)
        for own, each in zip(self.batches(padded), batches, strict=True):
            own.copy_(each)
        return padded.index_select(0, self.places)

    def batches(self, padded: Tensor) -> list[Tensor]:
        """Returns the values (P, H, D) by batch, (b, L, H, D)."""
        own = torch.split(padded, [examples * length for examples, length in self.shapes])
        return [each.view(*shape, *padded.shape[1:]) for each, shape in zip(own, self.shapes, strict=True)]


class _Pad(torch.autograd.Function):
    """Moves the values of tokens, (1, H, T, D), to each batch, float32, (b, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Places) -> tuple[Tensor, ...]:
        ctx.places, ctx.dtype = places, values.dtype
        return tuple(each.transpose(1, 2) for each in places.batches(places.pad(values[0].transpose(0, 1))))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        places: Places = ctx.places
        rows = places.unpad([each.transpose(1, 2) for each in gradients], ctx.dtype)
        return rows.index_fill_(0, places.rest, 0.0).transpose(0, 1)[None], None


class _Unpad(torch.autograd.Function):
    """Moves values of each batch, (b, L, H, D), to the tokens, (1, T, H, D), in another dtype."""

    @staticmethod
    def forward(ctx: Any, places: Places, dtype: torch.dtype, *values: Tensor) -> Tensor:
        ctx.places = places
        return places.unpad(values, dtype)[None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        places: Places = ctx.places
        return (None, None, *places.batches(places.pad(gradient[0]).index_fill_(0, places.fillers, 0.0)))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Computes attention in float32, also between half-precision layers.

    On CPUs with bf16 units the backward pass of torch's bf16 attention takes 12 times as long as in float32, more than
    bf16 saves in the linear layers.
    """
    dtype, places = query.dtype, options.pop(PLACES, None)
    if places is not None:
        if attention_mask is not NO_MASK:
            raise ValueError("this architecture has a mask of its own, which is for padded examples")
        padded = [cast(Sequence[Tensor], _Pad.apply(each, places)) for each in (query, key, value)]  # type: ignore[no-untyped-call]
        parts = zip(*padded, strict=True)
        outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts]
        return cast(Tensor, _Unpad.apply(places, dtype, *outputs)), None  # type: ignore[no-untyped-call]
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(dtype), None


transformers.AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
