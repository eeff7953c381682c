"""On a GPU a base has the bits of the CPU, updates are near those of the CPU, and a pass trains many clients.

pytest -m cuda
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from local_tasks import changed, local_task

from fedtune.client.torch.side_by_side import train_together
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import ClientTask, LocalResult
from fedtune.core.adapter.layout import Vector
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example
from fedtune.model import nf4
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import load_base

GPU = "cuda"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

Held = Literal["packed", "dequantized"]
SETTINGS = {"lora": AdapterSettings(rank=4), "core": AdapterSettings(kind="core", rank=4)}
LORA_TASK = local_task(seed=5, learning_rate=5e-3, local_steps=4, batch_tokens=128)
TASKS = {"lora": LORA_TASK, "core": changed(LORA_TASK, factors="r")}
TOLERANCE = 1e-2
"""Norm of the difference of two updates, relative to the update's: AdamW enlarges the rounding of small gradients."""
EXAMPLES = [Example(np.random.default_rng(seed).integers(5, 200, 12 + seed, dtype=np.int32), 4) for seed in range(24)]


def trainer_on(device: str, kind: str = "lora", held: Held = "dequantized") -> TorchTrainer:
    return TorchTrainer(
        adapt(load_base(ModelSettings(), weights=held, precision="fp32", device=device), SETTINGS[kind])
    )


def start_of(trainer: TorchTrainer) -> Vector:
    vector = trainer.layout.initial(0)
    return vector + np.random.default_rng(0).standard_normal(len(vector)).astype(np.float32) * np.float32(0.02)


def difference(ours: Vector, theirs: Vector) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (130, 70), (513, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_quantized_to_the_bits_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = nf4.quantize(weight.to(GPU)), nf4.quantize(weight)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].cpu(), tensor), name
    for unpacked in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(nf4.dequantize(found, unpacked).cpu(), nf4.dequantize(expected, unpacked))


def test_a_base_is_quantized_there() -> None:
    assert nf4.quantizes_alike(GPU)


@pytest.mark.parametrize("held", ["dequantized", "packed"])
def test_a_base_has_the_same_values_and_digest(held: Held) -> None:
    here, there = (trainer_on(device, held=held).model.base for device in ("cpu", GPU))
    assert here.digest == there.digest
    values = there.network.state_dict()
    for name, tensor in here.network.state_dict().items():
        assert torch.equal(values[name].cpu(), tensor), name


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("held", ["dequantized", "packed"])
def test_local_training_ends_near_where_the_cpu_s_does(kind: str, held: Held) -> None:
    here, there = (
        trainer.train(EXAMPLES, start_of(trainer), TASKS[kind]).update
        for trainer in (trainer_on(device, kind, held) for device in ("cpu", GPU))
    )
    assert difference(there, here) < TOLERANCE


@pytest.mark.parametrize("kind", SETTINGS)
def test_clients_of_one_pass_get_what_they_get_alone(kind: str) -> None:
    trainer = trainer_on(GPU, kind)
    tasks = [ClientTask(EXAMPLES[first:], start_of(trainer), TASKS[kind]) for first in range(3)]
    for task, found in zip(tasks, train_together(trainer.model, tasks), strict=True):
        assert isinstance(found, LocalResult)
        assert difference(found.update, trainer.train(task.examples, task.received, task.task).update) < TOLERANCE
