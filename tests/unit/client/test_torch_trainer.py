"""A trainer that runs out of memory retries in smaller steps; the second time it refuses, with the tried sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_tasks import local_task

from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import Limits
from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import UpdateError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example, prepare
from fedtune.data.records import Record
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base

MakeModel = Callable[..., Path]
TASK = local_task(seed=1, learning_rate=1e-3, local_steps=2, batch_tokens=256)
NO_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"


@contextmanager
def failing(model: AdaptedModel, limit: int, message: str = NO_MEMORY) -> Iterator[None]:
    """Makes forward passes of more tokens than the limit fail, as without memory for them."""
    model.lm_head  # noqa: B018  # checks itself with a forward pass of its own

    def check(_module: Any, _positional: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].numel() > limit:
            raise RuntimeError(message)

    hook = model.base.network.base_model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture
def world(make_model: MakeModel) -> tuple[AdaptedModel, Sequence[Example], Vector]:
    model = adapt(load_base(ModelSettings(str(make_model("llama"))), precision="fp32"), AdapterSettings(rank=4))
    records = [Record(f" lamp {room}", prompt=f"turn on the lamp in room {room}") for room in range(24)]
    return model, prepare(records, model.base.tokenizer, 64)[0], model.layout.initial(0)


def test_memory_that_runs_out_once_costs_smaller_micro_batches_and_no_update(world: Any) -> None:
    model, examples, received = world
    whole = train_locally(model, examples, received, TASK)
    trainer = TorchTrainer(model)
    with failing(model, 64):
        result = trainer.train(examples, received, TASK)
    np.testing.assert_allclose(result.update, whole.update, rtol=1e-2, atol=TASK.work.learning_rate * 0.02)
    assert trainer.limits == Limits(64)  # the next round avoids the same failure


def test_a_trainer_s_limits_are_kept_to(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, received = world
    whole = train_locally(model, examples, received, TASK)
    enabled: list[object] = []
    monkeypatch.setattr(model.base.network, "activation_checkpointing_enable", enabled.append)
    trainer = TorchTrainer(model, Limits(100, checkpointing=True))
    with failing(model, 100):
        result = trainer.train(examples, received, TASK)
    assert trainer.limits == Limits(100, checkpointing=True)  # there was memory enough
    assert len(enabled) == 1
    np.testing.assert_allclose(result.update, whole.update, rtol=1e-2, atol=TASK.work.learning_rate * 0.02)


def test_memory_that_runs_out_twice_refuses_the_update_with_the_sizes(world: Any) -> None:
    model, examples, received = world
    with (
        failing(model, 8),
        pytest.raises(UpdateError, match="at micro-batches of 256 tokens, and again at 64"),
    ):
        TorchTrainer(model).train(examples, received, TASK)


def test_with_memory_enough_the_bits_are_the_same(world: Any) -> None:
    model, examples, received = world
    assert np.array_equal(
        TorchTrainer(model).train(examples, received, TASK).update,
        train_locally(model, examples, received, TASK).update,
    )


def test_another_error_is_not_taken_for_want_of_memory(world: Any) -> None:
    model, examples, received = world
    trainer = TorchTrainer(model)
    with failing(model, 0, "a kernel is missing"), pytest.raises(RuntimeError, match="a kernel is missing"):
        trainer.train(examples, received, TASK)
    assert trainer.limits == Limits()


def test_a_trainer_s_limits_cut_evaluation_batches_and_not_the_score(make_model: MakeModel) -> None:
    model = adapt(load_base(ModelSettings(str(make_model())), precision="fp32"), AdapterSettings(rank=4))
    examples = [Example(np.arange(3, 15 + number, dtype=np.int32), 4) for number in range(8)]
    adapter = model.layout.initial(0)
    model.lm_head  # noqa: B018  # checks itself with a forward pass of its own
    sizes: list[int] = []
    model.base.network.base_model.register_forward_pre_hook(
        lambda _module, _positional, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    whole = TorchTrainer(model).evaluate(adapter, examples)
    assert max(sizes) > 48
    sizes.clear()
    assert TorchTrainer(model, Limits(48)).evaluate(adapter, examples).loss == pytest.approx(whole.loss, rel=1e-6)
    assert max(sizes) <= 48
