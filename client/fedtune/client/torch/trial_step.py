"""The trial step: one real training step under a plan, in a process of its own, to check the plan's predictions.

    measured = measure(case)          # starts a new process

On CPUs the peak is that of the resident set, over its size once every library is loaded and has trained the bundled
model for a step; the kernel's high-water mark is reset before the measured phase. On GPUs it is the allocator's. If
memory runs out, that process dies and not the caller's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fedtune.client.plan.backend import Case, Measured, Meter, case_from_json
from fedtune.client.plan.step_costs import Choices
from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import LocalTask
from fedtune.core.errors import RunError
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.shape import Precision

STEPS = 5  # until glibc's heap has settled
_SECONDS_ALLOWED = 900
_MARK_RESET = "5"
_FIRST_TO_KILL = "1000"


def measure(case: Case) -> Measured:
    """Runs the case in a new process.

    Raises:
        RunError: the process died, as it does when memory runs out, or took too long.
    """
    command = [sys.executable, "-m", "fedtune.client.torch.trial_step"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(case)),
            capture_output=True,
            text=True,
            timeout=_SECONDS_ALLOWED,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"one training step took more than {_SECONDS_ALLOWED} s on this device") from error
    if done.returncode < 0:
        raise RunError(f"the calibration step was killed by signal {-done.returncode}, as a process out of memory is")
    try:
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError) as error:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise RunError(f"the calibration step failed: {last}") from error


def run_case(case: Case) -> Measured:
    """Measures in this process; `measure` calls it in a new one, where the figures are meaningful."""
    torch.set_num_threads(case.threads)
    device = device_of(case.choices)
    warm_up(case.choices.precision, device)
    meter = meter_for(device)
    runtime = meter.reset()
    model = _load(case)
    loading = meter.peak()
    resident = meter.reset()
    seconds = [_train(model, case) for _ in range(STEPS)]
    return Measured(
        runtime=runtime,
        loading=loading - runtime,
        resident=resident - runtime,
        training=meter.peak() - runtime,
        step_seconds=min(seconds[1:]),
        tokens=case.choices.tokens,
    )


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
    _train(_load(case), case)


def meter_for(device: torch.device) -> Meter:
    """Returns the meter for models on that device."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()


class ProcessMeter:
    """Meters the resident set of this process and its high-water mark, as the kernel counts them."""

    def reset(self) -> int:
        """Returns free heap memory to the system and resets the peak; returns the bytes of the resident set."""
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)
        Path("/proc/self/clear_refs").write_text(_MARK_RESET)
        return _status("VmRSS")

    def peak(self) -> int:
        """Returns the peak since the reset, in bytes."""
        return _status("VmHWM")


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


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise RunError(f"/proc/self/status has no {key}; memory cannot be measured here")


def _load(case: Case) -> AdaptedModel:
    choices = case.choices
    loaded = load_base(case.model, weights=choices.weights, precision=choices.precision, device=device_of(choices))
    return adapt(loaded, case.adapter)


def _train(model: AdaptedModel, case: Case) -> float:
    """Takes one optimizer step on random tokens of the full length; returns its seconds."""
    choices, random = case.choices, np.random.default_rng(0)
    vocabulary = int(model.base.network.config.get_text_config().vocab_size)
    first = max(1, round(choices.sequence_length * (1.0 - case.target_share)))
    examples = [
        Example(random.integers(0, vocabulary, choices.sequence_length).astype(np.int32), first)
        for _ in range(case.micro_batch)
    ]
    settings = TrainingSettings(
        local_steps=1,
        learning_rate=1e-5,
        batch_tokens=choices.tokens,
        gradient_checkpointing=choices.checkpointing,
    )
    start = time.perf_counter()
    train_locally(model, examples, model.layout.initial(0), LocalTask(0, local_work(settings, model.layout.factors)))
    return time.perf_counter() - start


if __name__ == "__main__":
    with suppress(OSError):  # makes the kernel kill this process first where memory runs out, not its caller
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_KILL)
    print(json.dumps(asdict(run_case(case_from_json(json.load(sys.stdin))))))
