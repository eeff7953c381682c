"""A trial step of the onnxruntime trainer, see `fedtune.client.plan.trial`.

measured = measure(case)          # starts a new process

The peak is that of the memory which the kernel must keep: pages of the pack's mapped weights do not count.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fedtune.client.onnx.edge_training import train_on_pack
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.client.plan import trial
from fedtune.client.plan.backend import Case, Measured
from fedtune.client.plan.meter import KeptMeter


def measure(case: Case) -> Measured:
    """Runs the case in a new process.

    Raises:
        RunError: the process died, as it does when memory runs out, or took too long.
    """
    return trial.measure("fedtune.client.onnx.trial_step", case)


def run_case(case: Case) -> Measured:
    """Measures in this process; `measure` calls it in a new one, where the figures are meaningful."""
    return trial.measured_steps(case, KeptMeter(), lambda: _load(case))


def _load(case: Case) -> trial.Loaded:
    choices = case.choices
    trainer = open_trainer(
        Path(case.model.base), case.adapter, threads=choices.threads, unpacked=choices.weights == "unpacked"
    )
    network = trainer.network
    return trial.Loaded(trainer.layout, network.pack.facts.shape.vocabulary, partial(train_on_pack, network))


if __name__ == "__main__":
    trial.answer(run_case)
