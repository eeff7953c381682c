"""Completion-only cross-entropy in chunks equals the plain one on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.torch.training import training_mode
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.batches import collate
from fedtune.data.examples import Example
from fedtune.model import loss as loss_module
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.loss import LanguageModelHead, completion_loss, on_device, score
from fedtune.model.padding_free import PLACES

MakeModel = Callable[..., Path]
# Architectures with something between head and logits, and one whose split the language-model head cannot know.
CAPPED: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"final_logit_softcapping": 0.05}),
    ("cohere", {"logit_scale": 0.3}),
    ("granite", {"logits_scaling": 7.0}),
]


def load_adapted(directory: Path, precision: Any = "fp32") -> AdaptedModel:
    model = adapt(load_base(ModelSettings(str(directory)), precision=precision), AdapterSettings(rank=4))
    model.load((np.random.default_rng(0).standard_normal(model.layout.size) * 0.05).astype(np.float32))
    return model


def examples() -> list[Example]:
    random = np.random.default_rng(1)
    return [
        Example(random.integers(3, 250, length).astype(np.int32), first)
        for length, first in ((9, 4), (17, 1), (12, 11), (30, 10))
    ]


def plain_loss(network: nn.Module) -> torch.Tensor:
    """Sums the cross-entropy of all target tokens, one example at a time, without padding."""
    total = torch.zeros(())
    for example in examples():
        ids = torch.from_numpy(example.ids.astype(np.int64))
        logits = network(input_ids=ids[None]).logits[0].float()
        first = example.first_target
        total = total + nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")
    return total


def loss_and_gradient(model: AdaptedModel, compute: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.gradient.zero_()
    loss = compute()
    torch.autograd.backward(loss)
    return float(loss.detach()), model.gradient.clone()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_padding_loss_and_gradient_are_the_plain_ones(
    make_model: MakeModel, architecture: str, precision: str
) -> None:
    model = load_adapted(make_model(architecture), precision)
    batch = model.lm_head.batch(examples())
    assert batch.ids.shape == (1, 72)  # for 68 tokens
    loss, gradient = loss_and_gradient(model, lambda: completion_loss(model.lm_head, batch))
    expected, expected_gradient = loss_and_gradient(model, lambda: plain_loss(model.base.network))
    assert loss == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 1e-3)
    difference = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    assert difference < (1e-5 if precision == "fp32" else 0.02)


def test_whether_a_client_s_examples_are_padded_does_not_follow_from_clients_without_examples(
    make_model: MakeModel,
) -> None:
    model = load_adapted(make_model("llama"))
    alone, beside = model.lm_head.batch(examples()), model.lm_head.batch([], examples(), [], [])
    assert alone.places is not None
    assert beside.places is not None
    assert beside.stretches == [0, 72, 0, 0]
    assert beside.ids.equal(alone.ids)
    several = model.lm_head.batch(*[[each] for each in examples()])
    assert several.places is None, "each saves little"
    assert several.stretches == ()


def test_without_padding_checkpointed_gradients_are_the_same(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    batch = model.lm_head.batch(examples())
    _, expected = loss_and_gradient(model, lambda: completion_loss(model.lm_head, batch))
    with training_mode(model, 0, checkpointing=True):
        _, gradient = loss_and_gradient(model, lambda: completion_loss(model.lm_head, batch))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_examples_are_padded_where_little_is_padding_or_one_exceeds_a_window(make_model: MakeModel) -> None:
    model = load_adapted(make_model("mistral", sliding_window=16))
    longer = model.lm_head.batch(examples())
    assert longer.places is None
    expected = plain_loss(model.base.network).detach()
    assert float(completion_loss(model.lm_head, longer).detach()) == pytest.approx(float(expected), rel=1e-5)
    shorter = [Example(example.ids[:16], 1) for example in examples()]
    assert model.lm_head.batch(shorter).places is None  # a row would have 56 tokens, and has 64 with padding
    assert model.lm_head.batch(shorter * 4).places is not None


@pytest.mark.parametrize("dropped", ["position_ids", PLACES])
def test_an_architecture_that_ignores_where_tokens_are_gets_padding(make_model: MakeModel, dropped: str) -> None:
    network = (model := load_adapted(make_model("gpt2"))).base.network
    forward = network.base_model.forward
    network.base_model.forward = lambda *ids, **options: forward(*ids, **{**options, dropped: None})
    assert LanguageModelHead(model.base).padding_free == 0
    network.base_model.forward = forward
    assert LanguageModelHead(model.base).padding_free
    network.set_attn_implementation("eager")
    assert LanguageModelHead(model.base).padding_free == 0


@pytest.mark.parametrize("chunk_logits", [1 << 24, 2000, 1])
def test_padded_chunked_loss_and_gradient_are_the_plain_ones(
    make_model: MakeModel, architecture: str, chunk_logits: int
) -> None:
    model = load_adapted(make_model(architecture))
    lm_head = LanguageModelHead(model.base, chunk_logits)
    assert lm_head.split
    batch = on_device(collate(examples()), torch.device("cpu"))
    loss, gradient = loss_and_gradient(model, lambda: completion_loss(lm_head, batch))
    expected, expected_gradient = loss_and_gradient(model, lambda: plain_loss(model.base.network))
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("architecture", "settings"), CAPPED, ids=[name for name, _ in CAPPED])
def test_scaled_and_capped_logits_are_read_out_as_the_model_does(
    make_model: MakeModel, architecture: str, settings: dict[str, Any]
) -> None:
    model = load_adapted(make_model(architecture, **settings))
    assert model.lm_head.split
    batch = on_device(collate(examples()), torch.device("cpu"))
    expected = float(plain_loss(model.base.network).detach())
    assert float(completion_loss(model.lm_head, batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_an_architecture_that_does_something_else_falls_back_to_its_own_logits(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    network = model.base.network
    forward = network.forward

    def shifted(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = output.logits.roll(1, dims=-1)
        return output

    network.forward = shifted
    lm_head = LanguageModelHead(model.base)
    assert not lm_head.split
    batch = on_device(collate(examples()), torch.device("cpu"))
    loss, gradient = loss_and_gradient(model, lambda: completion_loss(lm_head, batch))
    expected, expected_gradient = loss_and_gradient(model, lambda: plain_loss(network))
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_the_loss_of_a_target_that_is_almost_certain_keeps_its_digits() -> None:
    """At logits near 200, where a float32 has steps of 1.5e-5."""
    rows = torch.linspace(150.0, 193.0, 64)[None] + torch.arange(4.0)[:, None]
    rows[:, 7] = 200.0
    wanted = torch.full((4,), 7)

    class Logits:
        chunk = 3

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    head: Any = Logits()
    losses: Any = loss_module._ChunkedCrossEntropies.apply(rows, wanted, head)  # type: ignore[no-untyped-call]
    expected = nn.functional.cross_entropy(rows.double(), wanted, reduction="none")
    assert expected.max() < 0.1
    torch.testing.assert_close(losses.double(), expected, rtol=5e-4, atol=0)


def test_scores_are_per_target(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    batch = on_device(collate(examples()), torch.device("cpu"))
    losses, right = score(model.lm_head, batch)
    assert losses.shape == right.shape == batch.targets.shape
    assert float(losses.sum()) == pytest.approx(float(plain_loss(model.base.network).detach()), rel=1e-5)


def test_logits_of_no_more_than_a_chunk_exist_at_once(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    lm_head = LanguageModelHead(model.base, 2000)
    rows: list[int] = []
    model.base.head.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    batch = on_device(collate(examples()), torch.device("cpu"))
    torch.autograd.backward(completion_loss(lm_head, batch))
    assert len(rows) > 1
    assert max(rows) <= 2000 // len(model.base.tokenizer)
    assert sum(rows) == len(batch.targets)
