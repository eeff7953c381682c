"""Scoring of an adapter: loss, perplexity and exact match on examples, and answers to prompts for people to read.

    parts = [piece.compute(model) for piece in scored_batches(examples, evaluation_tokens(device))]
    evaluation = total(parts)

Exact match counts an example as correct when, given the reference so far, the likeliest token is the reference's at
every position, the end included. By induction that is exactly when greedy decoding from the prompt gives the reference.

The work is cut into pieces that hold all that they need besides the model. The cut does not depend on who computes
them, so that a sum in their order has the same bits for any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedtune.core.errors import InputError
from fedtune.core.round_records import Evaluation
from fedtune.core.spans import span
from fedtune.data.batches import micro_batches
from fedtune.data.examples import Example, start_tokens
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.loss import score

ANSWERED_TOGETHER = 16
ANSWER_TOKENS = 64
_CPU_TOKENS = 512  # a batch's activations stay in the caches of a core: bf16 takes 0.85, fp32 0.75 of the time of 8192
_GPU_TOKENS = 8192

Result = TypeVar("Result", covariant=True)


class Piece(Protocol[Result]):
    """A piece of work on an adapted model, which may be sent to another process."""

    def compute(self, model: AdaptedModel) -> Result:
        """Computes the piece with the adapter that the model holds."""


@dataclass(frozen=True)
class Counts:
    """Sums over some examples.

    Args:
        loss: sum of the cross-entropies of all target tokens, in nats.
        exact: number of examples whose whole completion is right.
    """

    loss: float
    tokens: int
    exact: int
    examples: int


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """The scoring of examples that are computed at once."""

    examples: Sequence[Example]

    @torch.no_grad()
    def compute(self, model: AdaptedModel) -> Counts:
        """Scores the examples."""
        with span("scoring"):
            model.base.network.eval()
            device = model.base.device
            batch = model.lm_head.batch(self.examples)
            losses, right = score(model.lm_head, batch)
            wrong = torch.zeros(len(self.examples), device=device).index_add_(0, batch.owners, (~right).float())
            loss, exact = float(losses.cpu().double().sum()), int((wrong == 0).sum())
        return Counts(loss, len(losses), exact, len(self.examples))


@dataclass(frozen=True)
class AnsweredPrompts:
    """The answers to prompts that are decoded together, greedily until their end or `max_new_tokens`.

    Args:
        prompts: token ids of each prompt, as `prompt_ids` returns them.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int = ANSWER_TOKENS

    def compute(self, model: AdaptedModel) -> list[str]:
        """Returns the answers in the order of the prompts."""
        with span("answering prompts"):
            return generate(model, self.prompts, self.max_new_tokens)


def evaluation_tokens(device: torch.device) -> int:
    """Returns the number of tokens that an evaluation computes at once on a device, padding included."""
    return _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS


def scored_batches(examples: Sequence[Example], batch_tokens: int) -> list[ScoredBatch]:
    """Cuts examples into batches with little padding, each of at most `batch_tokens` tokens."""
    return [ScoredBatch(batch) for batch in micro_batches(examples, batch_tokens)]


def answered_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int = ANSWER_TOKENS, together: int = ANSWERED_TOGETHER
) -> list[AnsweredPrompts]:
    """Cuts prompts, in their order, into groups of at most `together` that are decoded at once."""
    groups = [prompts[first : first + together] for first in range(0, len(prompts), together)]
    return [AnsweredPrompts(group, max_new_tokens) for group in groups]


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the token ids of prompts as `fedtune.data.examples.render` returns them."""
    if not prompts:
        return []
    start = start_tokens(tokenizer)
    rows: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return [ids if ids[:1] == start else start + ids for ids in rows]  # a chat template writes its own start tokens


def total(parts: Sequence[Counts]) -> Evaluation:
    """Returns the evaluation of all examples; the parts are added in their order.

    Raises:
        InputError: there is no example.
    """
    examples, tokens = sum(part.examples for part in parts), sum(part.tokens for part in parts)
    if not examples:
        raise InputError("there is no example to evaluate on")
    loss, exact = sum(part.loss for part in parts), sum(part.exact for part in parts)
    return Evaluation(loss / tokens, exact / examples, examples, tokens)


def evaluate(model: AdaptedModel, examples: Sequence[Example], batch_tokens: int = _CPU_TOKENS) -> Evaluation:
    """Scores the adapter that the model holds, in this thread.

    Args:
        batch_tokens: number of tokens computed at once, padding included.

    Raises:
        InputError: there is no example.
    """
    return total([batch.compute(model) for batch in scored_batches(examples, batch_tokens)])


@torch.no_grad()
def generate(model: AdaptedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int = ANSWER_TOKENS) -> list[str]:
    """Returns the adapted model's answer to each prompt, decoded together, greedily until its end or `max_new_tokens`.

    Args:
        prompts: token ids of each prompt; there is at least one.
    """
    tokenizer: Any = model.base.tokenizer
    network, device = model.base.network.eval(), model.base.device
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    length = max(1, *map(len, prompts))
    # Padding is on the left, so that every answer begins in the same column.
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts], device=device)
    written = network.generate(ids, attention_mask=mask, generation_config=greedy)
    return cast(list[str], tokenizer.batch_decode(written[:, length:], skip_special_tokens=True))
