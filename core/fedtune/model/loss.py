"""Cross-entropy on the target tokens alone, in chunks, so that a large vocabulary's logits never exist all at once.

    L = Σ_t  logsumexp(z_t) - z_t[target_t],     z_t = language-model head(hidden state before token t), float32

The head is frozen, so the backward pass needs only the gradient with respect to the hidden states. It is computed chunk
by chunk in the forward pass, and a chunk's logits are dropped before the next chunk. The peak memory is a few tensors
of one chunk's size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtune.data.batches import Batch, collate, concatenate, row_length, row_starts, saved_by_concatenating
from fedtune.data.examples import Example
from fedtune.model.base_model import BaseModel
from fedtune.model.padding_free import ATTENTION, NO_MASK, PLACES, Places
from fedtune.model.shape import MAX_CHUNK_LOGITS

_CHECKED_TOKENS = 8
_AGREEMENT = 2e-2  # relative, between two roundings of one logit in bf16
_EQUAL = 1e-4  # relative, between states of the same numbers, computed alike
_LEAST_SAVED = 32  # tokens a client, from which on a batch takes less time without padding; measured on the demo


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A batch as tensors on one device; the shapes are those of `Batch`.

    Args:
        places: where the tokens are in the padded batches of attention; None if the batch is padded itself.
        stretches: tokens of each client in the row of a batch without padding; none of a padded one.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor
    places: Places | None = None
    stretches: Sequence[int] = ()


def on_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copies a batch to where the model computes."""
    arrays = (batch.ids, batch.positions, batch.targets, batch.owners)
    ids, positions, targets, owners = (torch.from_numpy(array).to(device) for array in arrays)
    return DeviceBatch(ids, positions, targets, owners)


class LanguageModelHead:
    """The language-model head, from token ids to logits at chosen positions, as the architecture computes them.

    The last hidden state goes through the head and the scaling or soft cap that some architectures apply after it. The
    class compares a few logits with the architecture's own; where they differ, it uses the architecture's full logits.

    Args:
        base: base model, whose network must be in evaluation mode.
        chunk_logits: number of logits that exist at once, at least those of one position.
    """

    def __init__(self, base: BaseModel, chunk_logits: int = MAX_CHUNK_LOGITS) -> None:
        self._network = base.network
        self._head = base.head
        config = base.network.config.get_text_config()
        # Cohere multiplies, Granite divides, Gemma caps.
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._vocabulary = int(config.vocab_size)
        self.chunk = max(1, chunk_logits // self._vocabulary)
        """Number of positions whose logits are computed at once."""
        self.split = True
        self.split = self._agrees(base.device)
        self.padding_free = self._longest_without_padding(config)
        """Tokens of the longest example that can be computed without padding; 0 where none can."""

    def batch(self, *clients: Sequence[Example]) -> DeviceBatch:
        """Returns a batch where the model computes, without padding if that is possible and faster.

        Args:
            clients: the examples of one or several clients, which lie client after client.
        """
        device = self._network.device
        lengths = [[len(example.ids) for example in own] for own in clients]
        longest, saved = max(map(max, filter(None, lengths))), saved_by_concatenating(*clients)
        if longest > self.padding_free or saved < _LEAST_SAVED * sum(map(bool, lengths)):
            return on_device(collate([example for own in clients for example in own]), device)
        batch = on_device(concatenate(*clients), device)
        return replace(batch, places=Places.of(lengths), stretches=row_starts(lengths)[1])

    def hidden(self, batch: DeviceBatch) -> Tensor:
        """Returns the states before the batch's targets, (targets, d); with gradient where it is enabled."""
        states = self._states(batch.ids, batch.places)
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps hidden states (n, d) to float32 logits (n, vocabulary)."""
        if not self.split:
            return hidden.float()
        count = min(row_length(len(hidden)), max(self.chunk, len(hidden)))  # few, for which kernels are prepared once
        padded = nn.functional.pad(hidden, (0, 0, 0, count - len(hidden)))
        logits = cast(Tensor, self._head(padded))[: len(hidden)].float()
        if self._scale != 1.0:
            logits = logits * self._scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def _states(self, ids: Tensor, places: Places | None = None) -> Tensor:
        options: dict[str, Any] = {}
        if places is not None:
            options = {"position_ids": places.positions, "attention_mask": NO_MASK, PLACES: places}
        if self.split:
            return cast(Tensor, self._network.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state)
        return cast(Tensor, self._network(input_ids=ids, use_cache=False, **options).logits)

    @torch.no_grad()
    def _agrees(self, device: torch.device) -> bool:
        ids = torch.arange(_CHECKED_TOKENS, device=device)[None] % self._vocabulary
        whole = self._network(input_ids=ids, use_cache=False).logits[0].float()
        try:
            split = self.logits(self._states(ids)[0])
        except (AttributeError, TypeError, RuntimeError):
            return False
        return split.shape == whole.shape and bool((split - whole).abs().max() <= _AGREEMENT * whole.abs().max())

    @torch.no_grad()
    def _longest_without_padding(self, config: Any) -> int:
        """Returns `padding_free`: 0 where two examples in one row have other states than in two.

        Both have as many tokens, so that all layers get the same numbers and round them alike. Without padding each
        token sees all before it in its example, so no example may exceed the window of any layer.
        """
        if self._network.config._attn_implementation != ATTENTION:
            return 0
        rows = torch.arange(_CHECKED_TOKENS).view(2, -1) % self._vocabulary
        try:
            found = self._states(rows.view(1, -1), Places.of([[rows.shape[1]] * 2]))
        except Exception:  # an architecture that takes no such keywords may raise any type
            return 0
        expected = self._states(rows).view(found.shape)
        if not (found - expected).abs().max() <= _EQUAL * expected.abs().max():
            return 0
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return min(window or sys.maxsize for window in windows)


def completion_loss(lm_head: LanguageModelHead, batch: DeviceBatch) -> Tensor:
    """Returns the summed cross-entropy of a batch's targets: float32, (), differentiable."""
    hidden = lm_head.hidden(batch)
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, batch.targets, lm_head))  # type: ignore[no-untyped-call]


def target_losses(lm_head: LanguageModelHead, batch: DeviceBatch) -> Tensor:
    """Returns the cross-entropy of each of a batch's targets: float32, (targets,), differentiable."""
    hidden = lm_head.hidden(batch)
    return cast(Tensor, _ChunkedCrossEntropies.apply(hidden, batch.targets, lm_head))  # type: ignore[no-untyped-call]


@torch.no_grad()
def score(lm_head: LanguageModelHead, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """Returns per target its cross-entropy, float32, and whether it is the likeliest token, bool; both (targets,)."""
    losses, right = [], []
    for rows, targets in _chunks(lm_head, lm_head.hidden(batch), batch.targets):
        logits = lm_head.logits(rows)
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(dim=1) == targets)
    return torch.cat(losses), torch.cat(right)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, lm_head: LanguageModelHead) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for losses, gradient in _by_chunk(lm_head, hidden, targets):
            total += losses.sum()
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden * gradient).to(by_hidden.dtype), None, None


class _ChunkedCrossEntropies(torch.autograd.Function):
    """The same with a loss for each target, so that each may have a weight of its own in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, lm_head: LanguageModelHead) -> Tensor:
        losses, gradients = zip(*_by_chunk(lm_head, hidden, targets), strict=True)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden * gradient[:, None]).to(by_hidden.dtype), None, None


def _by_chunk(lm_head: LanguageModelHead, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the cross-entropy of each target and its gradient with respect to the hidden state, chunk by chunk."""
    for rows, wanted in _chunks(lm_head, hidden, targets):
        yield _cross_entropies(lm_head, rows, wanted)  # at whose end a chunk's logits are dropped


def _cross_entropies(lm_head: LanguageModelHead, rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same of one chunk; the gradient with respect to the logits is p = softmax(z), minus 1 at the target.

    logsumexp(z) is max z - log max p, where the largest p is at least 1 over the vocabulary; the loss is added up from
    small terms, (max z - z_target) - log max p, and so keeps the digits of a target that is almost certain.
    """
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        logits = lm_head.logits(leaf)
    shares = torch.softmax(logits.detach(), dim=1)
    behind = logits.detach().amax(dim=1) - logits.detach().gather(1, wanted[:, None])[:, 0]
    losses = behind - shares.amax(dim=1).log()
    shares.scatter_add_(1, wanted[:, None], -torch.ones_like(shares[:, :1]))
    return losses, torch.autograd.grad(logits, leaf, shares)[0]


def _chunks(lm_head: LanguageModelHead, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, lm_head.chunk), torch.split(targets, lm_head.chunk), strict=True)
