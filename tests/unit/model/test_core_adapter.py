"""A core adapter computes what peft computes with the LoRA adapter it folds into, and trains R alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import LocalTask
from fedtune.core.adapter.adapter_files import save_adapter
from fedtune.core.errors import ModelError
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example, prepare
from fedtune.data.records import Record
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base

MakeModel = Callable[..., Path]
ADAPTER = AdapterSettings(kind="core", rank=4, alpha=8.0)
IDS = torch.tensor([[5, 9, 17, 60, 33, 8], [80, 7, 7, 21, 12, 4]])


def load_adapted(directory: Path, **options: Any) -> AdaptedModel:
    return adapt(load_base(ModelSettings(str(directory)), **{"precision": "fp32", **options}), ADAPTER)


def random_vector(model: AdaptedModel) -> Any:
    return (np.random.default_rng(0).standard_normal(model.layout.size) * 0.2).astype(np.float32)


def loss_of(network: nn.Module) -> torch.Tensor:
    logits = network(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_the_folded_adapter_is_one_that_peft_loads_on_the_original_model(
    make_model: MakeModel, architecture: str, tmp_path: Path
) -> None:
    directory = make_model(architecture)
    model = adapt(load_base(ModelSettings(str(directory), quantization="none"), precision="fp32"), ADAPTER)
    vector = random_vector(model)
    model.load(vector)
    save_adapter(tmp_path, model.layout, vector, base=str(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about layers that GPT-2 stores transposed
        original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        before = original(IDS).logits
        theirs = peft.PeftModel.from_pretrained(original, str(tmp_path))
    with torch.no_grad():
        ours = model.base.network(IDS).logits
        torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
        assert (ours - before).abs().max() > 1e-3


@pytest.mark.parametrize("weights", ["packed", "dequantized"])
def test_the_gradient_of_r_is_autograd_s(make_model: MakeModel, weights: str) -> None:
    model = load_adapted(make_model("llama"), weights=weights)
    vector = random_vector(model)
    model.load(vector)
    torch.autograd.backward(loss_of(model.base.network))
    gradient = model.gradient.numpy().copy()
    step = 1e-3
    for place in np.argsort(-np.abs(gradient))[:4]:
        losses = []
        for sign in (1, -1):
            moved = vector.copy()
            moved[place] += sign * step
            model.load(moved)
            with torch.no_grad():
                losses.append(float(loss_of(model.base.network)))
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient[place]), rel=0.05)


def test_every_form_of_the_base_has_the_same_fixed_factors(make_model: MakeModel) -> None:
    directory = make_model("llama")
    forms = [
        {"weights": "packed", "precision": "fp32"},
        {"weights": "dequantized", "precision": "fp32"},
        {"weights": "dequantized", "precision": "bf16"},
        {"weights": "packed", "precision": "fp16"},
    ]
    assert len({load_adapted(directory, **form).layout.fixed_digest for form in forms}) == 1


def test_weights_in_float16_are_refused_with_the_remedy(make_model: MakeModel) -> None:
    with pytest.raises(ModelError, match=r'training\.weights = "packed"'):
        load_adapted(make_model("llama"), weights="dequantized", precision="fp16")


def task_for(model: AdaptedModel, steps: int, optimizer: Any, owned: Any = None) -> LocalTask:
    settings = TrainingSettings(
        local_steps=steps, batch_tokens=256, optimizer=optimizer, learning_rate=0.02, weight_decay=0.1
    )
    return LocalTask(0, local_work(settings, model.layout.factors), owned)


def examples_for(model: AdaptedModel) -> list[Example]:
    records = [Record(f" lamp {room}", prompt=f"turn on the lamp in room {room}") for room in range(24)]
    return prepare(records, model.base.tokenizer, 64)[0]


@pytest.mark.parametrize("owned", [None, (1, 3)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_local_training_lowers_the_loss_and_moves_only_the_owned_block(
    make_model: MakeModel, owned: Any, optimizer: str
) -> None:
    model = load_adapted(make_model("llama"))
    examples, task = examples_for(model), task_for(model, 6, optimizer, owned)
    result = train_locally(model, examples, model.layout.initial(0), task)
    cores = result.update.reshape(-1, 4, 4)
    kept = np.ones((4, 4), dtype=np.bool_)
    if owned:
        kept = np.zeros((4, 4), dtype=np.bool_)
        kept[np.ix_(owned, owned)] = True
    assert not cores[:, ~kept].any()
    assert (cores[:, kept] != 0).mean() > 0.9
    again = train_locally(model, examples, result.update, task)
    assert again.loss < result.loss


def test_muon_moves_every_direction_alike_and_its_values_as_far_as_adamw(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    result = train_locally(model, examples_for(model), model.layout.initial(0), task_for(model, 1, "muon"))
    for core in result.update.reshape(-1, 4, 4):
        values = np.linalg.svd(core, compute_uv=False) / (0.02 * 0.2 * 4**0.5)
        # Newton-Schulz stops near 1 in every direction that the gradient has at all.
        assert values.max() < 1.4
        assert values[0] < 3 * values[1]


def test_muon_trains_lora_too(make_model: MakeModel) -> None:
    base = load_base(ModelSettings(str(make_model("llama"))), precision="fp32")
    model = adapt(base, AdapterSettings(rank=4, alpha=8.0))
    examples, task = examples_for(model), task_for(model, 6, "muon")
    received = model.layout.initial(0)
    result = train_locally(model, examples, received, task)
    assert train_locally(model, examples, received + result.update, task).loss < result.loss
