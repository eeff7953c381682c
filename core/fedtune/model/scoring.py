"""Scoring of an adapter: loss, perplexity and exact match on examples, and answers to prompts for people to read.

Exact match counts an example as correct when, given the reference so far, the likeliest token is the reference's at
every position, the end included. By induction that is exactly when greedy decoding from the prompt gives the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig

from fedtune.core.errors import InputError
from fedtune.core.round_records import Evaluation
from fedtune.data.batches import in_order_of_length
from fedtune.data.examples import Example, start_tokens
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.loss import on_device, score

EVALUATION_TOKENS = 8192  # per batch; more than in training, since nothing is kept for a backward pass
ANSWERED_TOGETHER = 16


@torch.no_grad()
def evaluate(model: AdaptedModel, examples: Sequence[Example], batch_tokens: int = EVALUATION_TOKENS) -> Evaluation:
    """Scores the adapter that the model holds.

    Args:
        batch_tokens: number of tokens computed at once, padding included.

    Raises:
        InputError: there is no example.
    """
    if not examples:
        raise InputError("there is no example to evaluate on")
    model.base.network.eval()
    device = model.base.device
    loss = 0.0
    tokens = exact = 0
    for arrays in in_order_of_length(examples, batch_tokens):
        batch = on_device(arrays, device)
        losses, right = score(model.lm_head, batch)
        wrong = torch.zeros(len(batch.ids), device=device).index_add_(0, batch.owners, (~right).float())
        loss += float(losses.cpu().double().sum())
        tokens += len(losses)
        exact += int((wrong == 0).sum())
    return Evaluation(loss / tokens, exact / len(examples), len(examples), tokens)


@torch.no_grad()
def answer(model: AdaptedModel, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
    """Returns the adapted model's answer to each prompt, decoded greedily until its end or `max_new_tokens`.

    Args:
        prompts: prompts as `fedtune.data.examples.render` returns them.
    """
    tokenizer: Any = model.base.tokenizer
    network, device = model.base.network.eval(), model.base.device
    start = start_tokens(tokenizer)
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[str] = []
    for first in range(0, len(prompts), ANSWERED_TOGETHER):
        asked = list(prompts[first : first + ANSWERED_TOGETHER])
        rows = [
            ids if ids[:1] == start else start + ids  # a chat template writes its own start tokens
            for ids in tokenizer(asked, add_special_tokens=False)["input_ids"]
        ]
        length = max(1, *map(len, rows))
        # Padding is on the left, so that every answer begins in the same column.
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        written = network.generate(ids, attention_mask=mask, generation_config=greedy)
        answers += cast(list[str], tokenizer.batch_decode(written[:, length:], skip_special_tokens=True))
    return answers
