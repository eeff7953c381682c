"""Evaluation: exact match agrees with greedy decoding, and loss with the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.errors import InputError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example, prepare
from fedtune.data.records import Record
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.scoring import evaluate, generate, prompt_ids

MakeModel = Callable[..., Path]
PROMPTS = [f"turn on the lamp in room {room}" for room in range(6)] + ["fan", "turn off the oven"]


@pytest.fixture
def model(make_model: MakeModel, architecture: str) -> AdaptedModel:
    adapted = adapt(load_base(ModelSettings(str(make_model(architecture))), precision="fp32"), AdapterSettings(rank=4))
    adapted.load((np.random.default_rng(3).standard_normal(adapted.layout.size) * 0.1).astype(np.float32))
    return adapted


def written(model: AdaptedModel, prompt: list[int], tokens: int) -> list[int]:
    """Decodes one prompt greedily, with one full forward pass a token."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model.base.network(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_an_example_matches_exactly_when_greedy_decoding_writes_it(model: AdaptedModel) -> None:
    tokenizer: Any = model.base.tokenizer
    right, wrong = [], []
    for number, text in enumerate(PROMPTS):
        prompt = tokenizer(text)["input_ids"]
        said = written(model, prompt, 5)
        right.append(Example(np.array(prompt + said, dtype=np.int32), len(prompt)))
        said[number % 5] = (said[number % 5] + 1) % len(tokenizer)
        wrong.append(Example(np.array(prompt + said, dtype=np.int32), len(prompt)))
    assert evaluate(model, right).exact_match == 1.0
    assert evaluate(model, wrong).exact_match == 0.0
    assert evaluate(model, right + wrong, batch_tokens=64).exact_match == 0.5


def test_answers_of_a_batch_are_those_of_decoding_alone(model: AdaptedModel) -> None:
    tokenizer: Any = model.base.tokenizer
    expected = []
    for prompt in PROMPTS:
        said = written(model, tokenizer(prompt)["input_ids"], 6)
        said = said[: said.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in said else said
        expected.append(tokenizer.decode(said, skip_special_tokens=True))
    assert generate(model, prompt_ids(PROMPTS, tokenizer), max_new_tokens=6) == expected


def test_loss_is_the_mean_over_target_tokens_however_examples_are_batched(model: AdaptedModel) -> None:
    tokenizer: Any = model.base.tokenizer
    records = [Record(" done" * (number + 1), prompt=prompt) for number, prompt in enumerate(PROMPTS)]
    examples, _ = prepare(records, tokenizer, 64)
    total = 0.0
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model.base.network(ids[None]).logits[0, :-1], ids[1:], reduction="none"
            )
        total += float(losses[example.first_target - 1 :].sum())
    tokens = sum(example.target_tokens for example in examples)
    for batch_tokens in (32, 8192):
        evaluation = evaluate(model, examples, batch_tokens)
        assert evaluation.loss == pytest.approx(total / tokens, rel=1e-5)
        assert (evaluation.examples, evaluation.tokens) == (len(PROMPTS), tokens)


def test_an_evaluation_of_nothing_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(InputError, match="no example"):
        evaluate(model, [])
