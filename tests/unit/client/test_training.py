"""Local training learns, is exact to the bit, and never sends values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_tasks import changed, local_task
from torch import nn

from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.errors import UpdateError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.batches import collate, steps_of_epoch
from fedtune.data.examples import Example, prepare
from fedtune.data.records import Record
from fedtune.demo import BASE_DIRECTORY
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.loss import completion_loss, on_device
from fedtune.model.scoring import evaluate, generate, prompt_ids

MakeModel = Callable[..., Path]
TASK = local_task(seed=5, learning_rate=5e-3, local_steps=4, batch_tokens=128)


def load_adapted(directory: Path, precision: Any = "fp32", weights: Any = "dequantized") -> AdaptedModel:
    base = load_base(ModelSettings(str(directory)), precision=precision, weights=weights)
    return adapt(base, AdapterSettings(rank=4))


def examples_of(model: AdaptedModel, thing: str, count: int = 24) -> list[Example]:
    records = [Record(f" {thing} {room}", prompt=f"turn on the {thing} in room {room}") for room in range(count)]
    return prepare(records, model.base.tokenizer, 64)[0]


def start_of(model: AdaptedModel) -> Any:
    vector = model.layout.initial(0)
    lora_b = vector[model.layout.segment("b")]
    lora_b[:] = np.random.default_rng(0).standard_normal(lora_b.size) * 0.02
    return vector


def test_training_lowers_the_loss(make_model: MakeModel, architecture: str) -> None:
    model = load_adapted(make_model(architecture), weights="packed")
    examples, received = examples_of(model, "lamp"), model.layout.initial(0)
    model.load(received)
    before = evaluate(model, examples)
    result = train_locally(model, examples, received, changed(TASK, local_steps=15))
    model.load(received + result.update)
    assert evaluate(model, examples).loss < before.loss - 0.2
    assert result.steps == 15
    assert result.examples == len(examples)
    assert result.target_tokens == sum(example.target_tokens for example in examples)
    assert result.loss < before.loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_result_is_the_same_bits_whoever_was_trained_between(make_model: MakeModel, precision: str) -> None:
    model = load_adapted(make_model("llama"), precision)
    received = start_of(model)
    lamp, fan = examples_of(model, "lamp"), examples_of(model, "fan", 9)
    first = train_locally(model, lamp, received, TASK)
    train_locally(model, fan, model.layout.initial(9), changed(TASK, factors="b", seed=8))
    evaluate(model, fan)
    again = train_locally(model, lamp, received, TASK)
    assert np.array_equal(first.update, again.update)
    assert first.loss == again.loss
    other = train_locally(model, lamp, received, changed(TASK, seed=6))
    assert not np.array_equal(first.update, other.update)


def test_dropout_follows_from_the_seed_and_disturbs_no_other_random_stream(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama", attention_dropout=0.2))
    examples, received = examples_of(model, "lamp"), start_of(model)
    torch.manual_seed(1)
    first = train_locally(model, examples, received, TASK)
    assert torch.initial_seed() == 1
    torch.manual_seed(2)
    again = train_locally(model, examples, received, TASK)
    assert np.array_equal(first.update, again.update)


def test_the_loop_is_adamw_on_the_mean_loss_with_clipping(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    examples, received = examples_of(model, "lamp"), start_of(model)
    task = changed(TASK, local_steps=3, weight_decay=0.1, max_gradient_norm=0.05)
    result = train_locally(model, examples, received, task)

    model.load(received)
    model.train_factors("ab")
    adapter = nn.Parameter(model.parameters)
    optimizer = torch.optim.AdamW([adapter], lr=task.work.learning_rate, weight_decay=0.1, foreach=False)
    losses, tokens = 0.0, 0
    for step in steps_of_epoch(examples, task.work.batch_tokens, task.seed, 0)[:3]:
        model.gradient.zero_()
        batch = on_device(collate(step), model.base.device)
        loss = completion_loss(model.lm_head, batch)
        torch.autograd.backward(loss / len(batch.targets))
        losses, tokens = losses + float(loss.detach()), tokens + len(batch.targets)
        adapter.grad = model.gradient * min(1.0, 0.05 / float(model.gradient.norm()))
        optimizer.step()
    np.testing.assert_allclose(result.update, model.vector() - received, rtol=1e-3, atol=1e-5)
    assert result.loss == pytest.approx(losses / tokens)


def test_in_fp16_a_step_whose_scaled_gradient_overflows_is_skipped_and_the_next_is_that_of_fp32() -> None:
    """The processor computes fp16 as a GPU without bf16 does, only slowly; the bundled base's gradients need it."""
    halves, exact = load_adapted(BASE_DIRECTORY, "fp16"), load_adapted(BASE_DIRECTORY, "fp32")
    examples, received = examples_of(halves, "lamp"), start_of(halves)
    task = changed(TASK, local_steps=1, batch_tokens=64)
    skipped = train_locally(halves, examples, received, task)
    assert math.isfinite(skipped.loss)
    assert not skipped.update.any()
    second = steps_of_epoch(examples, task.work.batch_tokens, task.seed, 0)[1]
    expected = train_locally(exact, second, received, task).update
    update = train_locally(halves, examples, received, changed(task, local_steps=2)).update
    assert np.linalg.norm(update - expected) < 0.1 * np.linalg.norm(expected)


def test_in_fp16_a_gradient_that_overflows_at_every_scale_ends_the_training(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"), "fp16")
    factor: Any = model.matrices("a")[0]
    factor.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UpdateError, match=r"the gradient's norm is .* at local step 17"):
        train_locally(model, examples_of(model, "lamp"), start_of(model), changed(TASK, local_steps=20))


def test_training_and_answering_say_nothing_on_the_terminal(
    make_model: MakeModel, architecture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_adapted(make_model(architecture))
    task = changed(TASK, gradient_checkpointing=True)
    train_locally(model, examples_of(model, "lamp"), start_of(model), task)
    generate(model, prompt_ids(["turn on the lamp", "fan"], model.base.tokenizer), max_new_tokens=4)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("factors", ["a", "b"])
def test_only_the_asked_factors_move(make_model: MakeModel, factors: Any) -> None:
    model = load_adapted(make_model("llama"))
    received = start_of(model)
    result = train_locally(model, examples_of(model, "lamp"), received, changed(TASK, factors=factors))
    segment = model.layout.segment(factors)
    assert result.update.shape == received[segment].shape
    assert np.abs(result.update).max() > 0
    moved = model.vector()
    assert np.array_equal(moved[segment] - received[segment], result.update)
    moved[segment] = received[segment]
    assert np.array_equal(moved, received)


def test_micro_batches_give_the_gradient_of_the_whole_step(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    examples, received = examples_of(model, "lamp"), start_of(model)
    task = changed(TASK, batch_tokens=512)
    whole = train_locally(model, examples, received, task)
    parts = train_locally(model, examples, received, changed(task, micro_batch_tokens=64))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    np.testing.assert_allclose(parts.update, whole.update, rtol=1e-2, atol=task.work.learning_rate * 0.02)


def test_checkpointing_computes_the_same_update(make_model: MakeModel, architecture: str) -> None:
    model = load_adapted(make_model(architecture))
    examples, received = examples_of(model, "lamp"), start_of(model)
    kept = train_locally(model, examples, received, TASK)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = next(module for module in model.base.network.modules() if hasattr(module, "lora_A"))
    hook.register_forward_pre_hook(count)
    twice = train_locally(model, examples, received, changed(TASK, gradient_checkpointing=True))
    assert calls == 2 * TASK.work.local_steps
    np.testing.assert_allclose(twice.update, kept.update, rtol=1e-3, atol=1e-6)


def test_fp16_scales_its_loss(make_model: MakeModel) -> None:
    directory = make_model("llama")
    updates = []
    for precision in ("fp32", "fp16"):
        model = load_adapted(directory, precision)
        updates.append(train_locally(model, examples_of(model, "lamp"), start_of(model), TASK).update)
    cosine = float(np.dot(updates[0], updates[1]) / np.linalg.norm(updates[0]) / np.linalg.norm(updates[1]))
    assert cosine > 0.95


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.5, 8), (0.01, 1)])
def test_epochs_are_passes_over_the_examples(make_model: MakeModel, epochs: float, steps: int) -> None:
    model = load_adapted(make_model("llama"))
    examples = examples_of(model, "lamp")
    assert len(steps_of_epoch(examples, TASK.work.batch_tokens, TASK.seed, 0)) == 3
    task = changed(TASK, local_steps=0, local_epochs=epochs)
    assert train_locally(model, examples, start_of(model), task).steps == steps


def with_infinite_gradient(_module: Any, _inputs: Any, output: Any) -> Any:
    output.last_hidden_state.register_hook(lambda gradient: gradient * math.inf)
    return output


def refused(model: AdaptedModel, examples: Sequence[Example], received: Any, task: LocalTask = TASK) -> str:
    with pytest.raises(UpdateError) as raised:
        train_locally(model, examples, received, task)
    return str(raised.value)


def test_what_is_not_finite_is_refused_with_a_reason(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    examples, received = examples_of(model, "lamp"), start_of(model)
    assert refused(model, [], received) == "the client has no examples to train on"
    assert "received adapter is not finite" in refused(model, examples, np.full_like(received, np.nan))
    huge = changed(TASK, learning_rate=1e38)
    assert "at local step 2" in refused(model, examples, received, huge)
    infinite = changed(TASK, learning_rate=1e39, local_steps=1)
    assert "update is not finite after 1 local steps" in refused(model, examples, received, infinite)
    hook = model.base.head.register_forward_hook(lambda _module, _inputs, logits: logits * math.nan)
    assert refused(model, examples, received) == "the loss is nan at local step 1"
    hook.remove()
    hook = model.base.network.base_model.register_forward_hook(with_infinite_gradient)
    assert "the gradient's norm is" in refused(model, examples, received)
    hook.remove()
    result: LocalResult = train_locally(model, examples, received, TASK)
    assert np.isfinite(result.update).all()


def test_a_proximal_term_pulls_towards_what_was_received(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    examples, received = examples_of(model, "lamp"), start_of(model)
    task = changed(TASK, local_steps=10)
    free = train_locally(model, examples, received, task).update
    first = changed(task, local_steps=1)
    held = train_locally(model, examples, received, changed(task, proximal=100.0)).update
    assert np.linalg.norm(held) < 0.5 * np.linalg.norm(free)
    # In the first step the adapter has not moved yet, so the proximal term is zero.
    assert np.array_equal(
        train_locally(model, examples, received, first).update,
        train_locally(model, examples, received, changed(first, proximal=100.0)).update,
    )


@pytest.mark.parametrize("factors", ["a", "b", "ab"])
def test_a_device_of_a_lower_tier_trains_its_rank_indices_and_moves_nothing_else(
    make_model: MakeModel, factors: Any
) -> None:
    model = load_adapted(make_model("llama"))
    examples, received = examples_of(model, "lamp"), start_of(model)
    task = changed(TASK, factors=factors, owned=(1, 3), weight_decay=0.1)
    whole = np.zeros(model.layout.size, dtype=np.float32)
    whole[model.layout.segment(factors)] = train_locally(model, examples, received, task).update
    for lora_a, lora_b in model.layout.pairs(whole).values():
        assert not lora_a[[0, 2]].any()
        assert not lora_b[:, [0, 2]].any()
        assert lora_a[[1, 3]].any() == ("a" in factors)
        assert lora_b[:, [1, 3]].any() == ("b" in factors)


def test_owning_every_rank_index_is_training_the_whole(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    examples, received = examples_of(model, "lamp"), start_of(model)
    every = changed(TASK, owned=(0, 1, 2, 3))
    assert np.array_equal(
        train_locally(model, examples, received, TASK).update, train_locally(model, examples, received, every).update
    )
