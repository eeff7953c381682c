"""The onnxruntime trainer gives the torch trainer's updates and scores, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_tasks import changed, local_task

from fedtune.client.onnx.edge_network import EdgeNetwork
from fedtune.client.onnx.onnx_trainer import OnnxTrainer, open_trainer
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import Limits, LocalTask, Trainer
from fedtune.core.adapter.layout import Factors, Vector
from fedtune.core.errors import InputError, UpdateError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.batches import Batch
from fedtune.data.examples import Example, prepare
from fedtune.data.records import Record
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import load_base

LORA = AdapterSettings(rank=4, alpha=8.0)
CORE = AdapterSettings(kind="core", rank=4, alpha=8.0)
TASK = local_task(seed=5, learning_rate=5e-3, local_steps=6, batch_tokens=128)
CORE_TASK = changed(TASK, factors="r", optimizer="muon")
TOLERANCE = 1e-3
"""Norm of the difference of two updates, relative to the update's: AdamW enlarges the rounding of small gradients."""
MUON_TOLERANCE = 3e-2
"""The same for Muon, which computes in bfloat16: a sum in another order may round to the next value, 2^-8 away."""


def open_both(demo_pack: Path, settings: AdapterSettings) -> tuple[OnnxTrainer, TorchTrainer]:
    base = load_base(ModelSettings(), precision="fp32", weights="packed")
    return open_trainer(demo_pack, settings), TorchTrainer(adapt(base, settings))


def examples_of(trainer: Trainer, thing: str = "lamp", count: int = 24) -> list[Example]:
    records = [Record(f" {thing} {room}", prompt=f"turn on the {thing} in room {room}") for room in range(count)]
    return prepare(records, trainer.tokenizer, 64)[0]


def start_of(trainer: Trainer) -> Vector:
    vector = trainer.layout.initial(0)
    return vector + np.random.default_rng(0).standard_normal(len(vector)).astype(np.float32) * np.float32(0.02)


def difference(ours: Vector, theirs: Vector) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("settings", "task", "tolerance"),
    [
        (LORA, TASK, TOLERANCE),
        (LORA, changed(TASK, weight_decay=0.1, max_gradient_norm=0.05, proximal=0.3), TOLERANCE),
        (LORA, changed(TASK, factors="b", local_steps=0, local_epochs=1.5), TOLERANCE),
        (LORA, changed(TASK, owned=(1, 3), weight_decay=0.1), TOLERANCE),
        (LORA, changed(TASK, optimizer="muon", micro_batch_tokens=48), MUON_TOLERANCE),
        (CORE, CORE_TASK, MUON_TOLERANCE),
        (CORE, changed(CORE_TASK, owned=(0, 2), proximal=0.3, weight_decay=0.1), MUON_TOLERANCE),
        (CORE, changed(CORE_TASK, optimizer="adamw"), TOLERANCE),
    ],
    ids=["lora", "clipped", "b-epochs", "owned", "lora-muon", "core", "core-owned", "core-adamw"],
)
def test_the_update_of_a_local_round_is_torch_s(
    demo_pack: Path, settings: AdapterSettings, task: LocalTask, tolerance: float
) -> None:
    onnx, torch = open_both(demo_pack, settings)
    examples, received = examples_of(torch), start_of(torch)
    theirs = torch.train(examples, received, task)
    ours = onnx.train(examples, received, task)
    assert difference(ours.update, theirs.update) < tolerance
    assert task.owned is None or np.array_equal(ours.update == 0, theirs.update == 0)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    for name in ("examples", "target_tokens", "steps", "tokens"):
        assert getattr(ours, name) == getattr(theirs, name)
    again = onnx.train(examples, received, task)
    assert np.array_equal(again.update, ours.update)


def test_a_score_is_torch_s(demo_pack: Path) -> None:
    onnx, torch = open_both(demo_pack, LORA)
    examples = examples_of(torch, count=40)
    trained = start_of(torch) + torch.train(examples, start_of(torch), changed(TASK, local_steps=6)).update
    theirs, ours = torch.evaluate(trained, examples), onnx.evaluate(trained, examples)
    assert 0 < theirs.exact_match < 1
    assert ours.exact_match == theirs.exact_match
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert (ours.examples, ours.tokens) == (theirs.examples, theirs.tokens)


def test_limits_change_an_update_by_rounding_only(demo_pack: Path) -> None:
    trainer = open_trainer(demo_pack, LORA)
    examples, received = examples_of(trainer), start_of(trainer)
    whole = trainer.train(examples, received, TASK)
    trainer.limits = Limits(tokens=32)
    cut = trainer.train(examples, received, TASK)
    assert cut.tokens <= whole.tokens
    assert difference(cut.update, whole.update) < TOLERANCE


def test_the_received_adapter_stays_as_it_is(demo_pack: Path) -> None:
    trainer = open_trainer(demo_pack, LORA)
    received = start_of(trainer)
    before = received.copy()
    trainer.train(examples_of(trainer), received, TASK)
    assert np.array_equal(received, before)


def test_it_never_returns_an_update_that_is_not_finite(demo_pack: Path) -> None:
    trainer = open_trainer(demo_pack, LORA)
    examples, received = examples_of(trainer), start_of(trainer)
    with pytest.raises(UpdateError, match="no examples"):
        trainer.train([], received, TASK)
    with pytest.raises(InputError, match="no example"):
        trainer.evaluate(received, [])
    with pytest.raises(UpdateError, match="received adapter is not finite"):
        trainer.train(examples, np.full_like(received, np.nan), TASK)
    with pytest.raises(UpdateError, match="at local step"):
        trainer.train(examples, received + np.float32(1e30), TASK)


class ShortOfMemory(EdgeNetwork):
    """A network with memory for passes of a limited number of tokens."""

    def __init__(self, network: EdgeNetwork, limit: int, error: Exception) -> None:
        super().__init__(network.pack, network.layout)
        self._limit, self._error = limit, error

    def add_gradient(
        self, batch: Batch, scale: float, factors: Factors, gradient: Vector, *, checkpointing: bool = False
    ) -> float:
        if batch.ids.size > self._limit:
            raise self._error
        return super().add_gradient(batch, scale, factors, gradient, checkpointing=checkpointing)


NO_MEMORY = RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code: std::bad_alloc")


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError()], ids=["onnxruntime", "numpy"])
def test_memory_that_runs_out_once_costs_smaller_micro_batches_and_no_update(demo_pack: Path, error: Exception) -> None:
    whole = open_trainer(demo_pack, LORA)
    examples, received = examples_of(whole), start_of(whole)
    trainer = OnnxTrainer(ShortOfMemory(whole.network, 32, error))
    result = trainer.train(examples, received, TASK)
    assert difference(result.update, whole.train(examples, received, TASK).update) < TOLERANCE
    assert trainer.limits == Limits(32, checkpointing=True)  # the next round avoids the same failure


def test_memory_that_runs_out_twice_refuses_the_update_with_the_sizes(demo_pack: Path) -> None:
    network = open_trainer(demo_pack, LORA).network
    trainer = OnnxTrainer(ShortOfMemory(network, 8, NO_MEMORY))
    with pytest.raises(UpdateError, match="at micro-batches of 128 tokens, and again at 32"):
        trainer.train(examples_of(trainer), start_of(trainer), TASK)


def test_another_error_is_not_taken_for_want_of_memory(demo_pack: Path) -> None:
    network = open_trainer(demo_pack, LORA).network
    trainer = OnnxTrainer(ShortOfMemory(network, 0, RuntimeError("a kernel is missing")))
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        trainer.train(examples_of(trainer), start_of(trainer), TASK)
    assert trainer.limits == Limits()


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.client.trainer import LocalTask
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings
from fedtune.data.examples import Example

trainer = open_trainer(Path(sys.argv[1]), AdapterSettings(kind="lora", rank=4))
examples = [Example(np.arange(3, 131, dtype=np.int32), 64) for _ in range(32)]
work = local_work(TrainingSettings(learning_rate=1e-3, local_steps=1, batch_tokens=4096), "ab")
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 150_000_000,) * 2)
result = trainer.train(examples, trainer.layout.initial(0), LocalTask(0, work))
print(trainer.limits.tokens, np.isfinite(result.update).all())
"""


@pytest.mark.slow  # how much of an address space is free depends on the machine
def test_a_process_that_gets_no_more_memory_goes_on_with_a_quarter(demo_pack: Path) -> None:
    command = [sys.executable, "-c", LITTLE_MEMORY, str(demo_pack)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1024", "True"]


WITHOUT_TORCH = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "safetensors", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
from pathlib import Path
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.client.trainer import LocalTask
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings
from fedtune.data.examples import prepare
from fedtune.data.records import Record

trainer = open_trainer(Path(sys.argv[1]), AdapterSettings(kind=sys.argv[2], rank=4))
records = [Record(f" fan {room}", prompt=f"turn off fan {room}") for room in range(9)]
examples, _ = prepare(records, trainer.tokenizer, 64)
work = local_work(TrainingSettings(learning_rate=1e-2, local_steps=8), trainer.layout.factors)
received = trainer.layout.initial(1)
result = trainer.train(examples, received, LocalTask(3, work))
after = received.copy()
after[trainer.layout.segment(work.factors)] += result.update
losses = [trainer.evaluate(vector, examples).loss for vector in (received, after)]
print(json.dumps(losses))
"""


@pytest.mark.parametrize("kind", ["lora", "core"])
def test_a_process_that_cannot_import_torch_trains(demo_pack: Path, kind: str) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(demo_pack), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after < before - 0.02


@pytest.mark.parametrize(("settings", "task"), [(LORA, TASK), (CORE, CORE_TASK)], ids=["lora", "core"])
def test_ten_steps_of_the_demo_give_torch_s_loss(demo_pack: Path, settings: AdapterSettings, task: LocalTask) -> None:
    onnx, torch = open_both(demo_pack, settings)
    examples, received = examples_of(torch), torch.layout.initial(0)
    theirs = torch.train(examples, received, changed(task, local_steps=10))
    ours = onnx.train(examples, received, changed(task, local_steps=10))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert difference(ours.update, theirs.update) < MUON_TOLERANCE
