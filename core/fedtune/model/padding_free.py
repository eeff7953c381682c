"""Attention on processors: in float32, and over examples that lie one after another without padding between them.

    places = Places.of(lengths, ids.numel())                 # of a batch's examples, sorted by length
    network(ids, position_ids=places.positions, attention_mask=NO_MASK, **{PLACES: places})

A step's examples differ in length: padded to the longest, a third of the demo's tokens are padding, which costs as much
as any other token in every linear layer. Without padding the T tokens of B examples are one row of the network's input.
Every layer but attention treats each token alone; attention moves its inputs to padded batches, one of the first half
of the examples and one of the second, so that there is little padding in either, and its outputs back.

    tokens (1, H, T, D) --pad--> (B/2, H, L, D) twice --causal attention--> (B/2, L, H, D) --unpad--> (1, T, H, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "fedtune_attention"
"""The name of this attention for transformers."""

PLACES = "fedtune_places"
"""The keyword by which a network's forward pass hands the places of its tokens on to attention."""

NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""A mask of four dimensions, which transformers hands on as it is; without one it would compute its own."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Some examples.

    Args:
        examples: b of them.
        length: L, tokens of the longest.
        flat: int64, (t,): the index of each token in (b · L).
    """

    examples: int
    length: int
    flat: Tensor

    @classmethod
    def of(cls, positions: Tensor, lengths: Sequence[int]) -> _Part:
        """Returns the part of examples of these lengths, whose tokens have these positions, (t,), in them."""
        rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return cls(len(lengths), max(lengths), rows * max(lengths) + positions)

    def pad(self, values: Tensor) -> Tensor:
        """Moves values (H, t, D) to where they are in a batch: float32, (b, H, L, D), else 0."""
        rows = values.transpose(0, 1)
        padded = torch.zeros(self.examples * self.length, *rows.shape[1:], device=rows.device)
        padded = padded.index_copy(0, self.flat, rows.float())
        return padded.view(self.examples, self.length, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, values: Tensor) -> Tensor:
        """Moves values of a batch, (b, L, H, D), to the tokens, (t, H, D)."""
        return values.flatten(0, 1).index_select(0, self.flat)


@dataclass(frozen=True, eq=False)
class Places:
    """The places of tokens without padding in batches with padding.

    Args:
        parts: the batches.
        rest: tokens after the last example, which are in none of them.
        positions: int64, (1, T): the index of each token in its example; 0 for the rest.
    """

    parts: Sequence[_Part]
    rest: int
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], tokens: int) -> Places:
        """Returns the places of this many tokens of examples of these lengths, one example after another."""
        half = len(lengths) // 2
        halves = [each for each in (lengths[:half], lengths[half:]) if each]
        positions = [torch.cat([torch.arange(length) for length in each]) for each in halves]
        rest = torch.zeros(tokens - sum(lengths), dtype=torch.int64)
        parts = [_Part.of(*each) for each in zip(positions, halves, strict=True)]
        return cls(parts, len(rest), torch.cat([*positions, rest])[None])

    def pad(self, values: Tensor) -> list[Tensor]:
        """Moves the values of tokens, (1, H, T, D), to each part's batch, float32, (b, H, L, D)."""
        own = torch.split(values[0], [*(len(part.flat) for part in self.parts), self.rest], dim=1)
        return [part.pad(each) for part, each in zip(self.parts, own, strict=False)]

    def unpad(self, values: Sequence[Tensor]) -> Tensor:
        """Moves values of each part's batch, (b, L, H, D), to the tokens, (1, T, H, D), with 0 for the rest."""
        own = [part.unpad(each) for part, each in zip(self.parts, values, strict=True)]
        return torch.cat([*own, own[0].new_zeros(self.rest, *own[0].shape[1:])])[None]


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
        parts = zip(places.pad(query), places.pad(key), places.pad(value), strict=True)
        outputs = [sdpa_attention_forward(module, *each, None, **options)[0] for each in parts]
        return places.unpad(outputs).to(dtype), None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(dtype), None


transformers.AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
