"""A trial step of the torch trainer, see `fedtune.client.plan.trial`.

    measured = measure(case)          # starts a new process

On CPUs the peak is that of the resident set, over its size once torch has trained the bundled model for a step; on GPUs
it is the allocator's.
"""

from __future__ import annotations

import gc
from functools import partial

import torch

from fedtune.client.plan import trial
from fedtune.client.plan.backend import Case, Measured, Meter
from fedtune.client.plan.meter import ProcessMeter
from fedtune.client.plan.step_costs import Choices
from fedtune.client.torch.training import train_locally
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import BaseModel, load_base
from fedtune.model.shape import Precision


def measure(case: Case) -> Measured:
    """Runs the case in a new process.

    Raises:
        RunError: the process died, as it does when memory runs out, or took too long.
    """
    return trial.measure("fedtune.client.torch.trial_step", case)


def run_case(case: Case) -> Measured:
    """Measures in this process; `measure` calls it in a new one, where the figures are meaningful."""
    torch.set_num_threads(case.choices.threads)
    device = device_of(case.choices)
    warm_up(case.choices.precision, device)
    set_threads = None if case.choices.cuda else torch.set_num_threads
    return trial.measured_steps(case, meter_for(device), lambda: _load(case), set_threads)


def device_of(choices: Choices) -> torch.device:
    """Returns the device on which a plan computes."""
    return torch.device("cuda" if choices.cuda else "cpu")


def warm_up(precision: Precision, device: torch.device) -> None:
    """Trains the bundled model for a step, which loads the kernels, threads and libraries that any training needs."""
    choices = Choices(
        weights="packed",
        precision=precision,
        rank=16,
        sequence_length=32,
        tokens=64,
        checkpointing=False,
        cuda=device.type == "cuda",
    )
    case = Case(ModelSettings(), AdapterSettings(), choices)
    trial.take_step(_load(case), case)


def load(model: ModelSettings, choices: Choices, device: torch.device) -> BaseModel:
    """Loads a base model in the form that a plan chose."""
    assert choices.weights == "packed" or choices.weights == "dequantized"
    return load_base(model, weights=choices.weights, precision=choices.precision, device=device)


def meter_for(device: torch.device) -> Meter:
    """Returns the meter for models on that device."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()


class CudaMeter:
    """Meters the memory that torch's allocator holds on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> int:
        """Resets the peak; returns the allocated bytes."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Returns the peak since the reset, in bytes."""
        return torch.cuda.max_memory_allocated(self._device)


def _load(case: Case) -> trial.Loaded:
    model = adapt(load(case.model, case.choices, device_of(case.choices)), case.adapter)
    vocabulary = int(model.base.network.config.get_text_config().vocab_size)
    return trial.Loaded(model.layout, vocabulary, partial(train_locally, model))


if __name__ == "__main__":
    trial.answer(run_case)
