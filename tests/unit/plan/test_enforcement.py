"""One out-of-memory costs time; a second one costs the round, with the sizes that were tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client.torch import training
from fedtune.client.torch.enforcement import train_within_memory
from fedtune.client.torch.training import LocalTask, train_locally
from fedtune.core.errors import UpdateError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import prepare
from fedtune.data.records import Record
from fedtune.model.base_model import load_base
from fedtune.model.lora import Limits, adapt
from fedtune.model.loss import completion_loss

MakeModel = Callable[..., Path]
TASK = LocalTask(seed=1, learning_rate=1e-3, local_steps=2, batch_tokens=256)


def scarce(limit: int) -> Any:
    """A loss that finds no memory for batches of more tokens than the limit."""

    def loss(lm_head: Any, batch: Any) -> torch.Tensor:
        if batch.ids.numel() > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return completion_loss(lm_head, batch)

    return loss


@pytest.fixture
def world(make_model: MakeModel) -> Any:
    model = adapt(load_base(ModelSettings(str(make_model("llama"))), precision="fp32"), AdapterSettings(rank=4))
    records = [Record(f" lamp {room}", prompt=f"turn on the lamp in room {room}") for room in range(24)]
    return model, prepare(records, model.base.tokenizer, 64)[0], model.layout.initial(0)


def test_memory_that_runs_out_once_costs_smaller_micro_batches_and_no_update(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples, received = world
    whole = train_locally(model, examples, received, TASK)
    monkeypatch.setattr(training, "completion_loss", scarce(64))
    result = train_within_memory(model, examples, received, TASK)
    np.testing.assert_allclose(result.update, whole.update, rtol=1e-2, atol=TASK.learning_rate * 0.02)
    assert model.limits == Limits(64)  # the next round does not run into it again


def test_a_model_s_limits_are_kept_to(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, received = world
    whole = train_locally(model, examples, received, TASK)
    enabled: list[object] = []
    monkeypatch.setattr(model.base.network, "activation_checkpointing_enable", enabled.append)
    monkeypatch.setattr(training, "completion_loss", scarce(100))
    monkeypatch.setattr(model, "limits", Limits(100, checkpointing=True))
    result = train_within_memory(model, examples, received, TASK)
    assert model.limits == Limits(100, checkpointing=True)  # memory did not run out
    assert len(enabled) == 1
    np.testing.assert_allclose(result.update, whole.update, rtol=1e-2, atol=TASK.learning_rate * 0.02)


def test_memory_that_runs_out_twice_refuses_the_update_with_the_sizes(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples, received = world
    monkeypatch.setattr(training, "completion_loss", scarce(8))
    with pytest.raises(UpdateError, match="at micro-batches of 256 tokens, and again at 64"):
        train_within_memory(model, examples, received, TASK)


def test_with_memory_enough_the_bits_are_the_same(world: Any) -> None:
    model, examples, received = world
    assert np.array_equal(
        train_within_memory(model, examples, received, TASK).update,
        train_locally(model, examples, received, TASK).update,
    )


def test_another_error_is_not_taken_for_want_of_memory(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, received = world

    def broken(lm_head: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(training, "completion_loss", broken)
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        train_within_memory(model, examples, received, TASK)
