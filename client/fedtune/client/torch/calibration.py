"""One real training step under a plan, in a process of its own, and what it took: the check on every prediction.

    measured = measure(Case(base="demo", ...))          # starts a process, which nothing before it has touched
    store.keep(key, Calibration(kappa=..., seconds_per_token=...))

On CPUs the peak is that of the resident set, over its size once every library is loaded and has trained the bundled
model for a step; the kernel's high-water mark is reset before the phase that is measured. On GPUs it is the
allocator's. A step that takes more memory than there is kills that process and not the caller.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtune.core.errors import RunError
from fedtune.core.job.settings import DEMO
from fedtune.model.shape import Precision, Weights

STEPS = 5  # after which glibc's heap has settled
LIKELY_KAPPA = (0.2, 5.0)
_SECONDS_ALLOWED = 900
_MARK_RESET = "5"
_FIRST_TO_GO = "1000"


@dataclass(frozen=True)
class Case:
    """What to load and to train for a step.

    Args:
        base: directory, hub id or "demo".
        target_share: share of the tokens that the loss counts.
        threads: torch's.
    """

    base: str
    quantization: str
    weights: Weights
    precision: Precision
    rank: int
    alpha: float
    sequence_length: int
    micro_batch: int
    checkpointing: bool
    target_share: float = 1.0
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    """What it took, in bytes over the process before it loaded the model, and seconds.

    Args:
        runtime: the process before that.
        loading: peak while the model was read and packed.
        resident: after that.
        training: peak of the steps.
        step_seconds: the shortest of the steps but the first.
        tokens: of a step.
    """

    runtime: int
    loading: int
    resident: int
    training: int
    step_seconds: float
    tokens: int

    @property
    def peak(self) -> int:
        """The higher of the two peaks."""
        return max(self.loading, self.training)


@dataclass(frozen=True)
class Calibration:
    """What is remembered of one device and model.

    Args:
        kappa: measured over predicted, of what a plan can change.
        seconds_per_token: of a training step.
    """

    kappa: float
    seconds_per_token: float


class CalibrationStore:
    """Calibrations on disk, one small file each.

    Args:
        folder: made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Calibration | None:
        """What is known, or None; a file that is damaged or says impossible things is as good as none."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            calibration = Calibration(float(found["kappa"]), float(found["seconds_per_token"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        low, high = LIKELY_KAPPA
        return calibration if low <= calibration.kappa <= high and 0 < calibration.seconds_per_token < 3600 else None

    def keep(self, key: str, calibration: Calibration) -> None:
        """Remembers one."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(calibration)), encoding="utf-8")
        temporary.replace(path)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def measure(case: Case) -> Measured:
    """Runs the case in a fresh process.

    Raises:
        RunError: the process died, which is what too little memory looks like, or took too long.
    """
    command = [sys.executable, "-m", "fedtune.client.torch.calibration"]
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
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RunError(f"the calibration step failed: {last}") from error


def run_case(case: Case) -> Measured:
    """Measures in this process; `measure` is what makes the figures mean something."""
    import torch

    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    warm_up(case.precision, case.device)
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
        tokens=case.sequence_length * case.micro_batch,
    )


def warm_up(precision: Precision, device: str) -> None:
    """Trains the bundled model for a step: kernels, threads and libraries that any training needs are there then."""
    case = Case(DEMO, "nf4", "packed", precision, 16, 32.0, 32, 2, False, device=device)
    _train(_load(case), case)


class Meter(Protocol):
    """Counts the memory of this process."""

    def reset(self) -> int:
        """Forgets the peak; what is held now, bytes."""

    def peak(self) -> int:
        """Since the reset, bytes."""


def meter_for(device: Any) -> Meter:
    """The one that counts what a model on that torch device takes."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter()


class ProcessMeter:
    """The resident set of this process and its high-water mark, as the kernel counts them."""

    def reset(self) -> int:
        """Gives back what is free, forgets the peak; the resident set, bytes."""
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)
        Path("/proc/self/clear_refs").write_text(_MARK_RESET)
        return _status("VmRSS")

    def peak(self) -> int:
        """Since the reset, bytes."""
        return _status("VmHWM")


class CudaMeter:
    """What torch's allocator holds on a GPU."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def reset(self) -> int:
        """Forgets the peak; what is allocated, bytes."""
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Since the reset, bytes."""
        import torch

        return torch.cuda.max_memory_allocated(self._device)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise RunError(f"/proc/self/status has no {key}; memory cannot be measured here")


def _load(case: Case) -> Any:
    from fedtune.core.job.settings import AdapterSettings, ModelSettings
    from fedtune.model.base_model import load_base
    from fedtune.model.lora import adapt

    loaded = load_base(
        ModelSettings(case.base, case.quantization),  # type: ignore[arg-type]
        weights=case.weights,
        precision=case.precision,
        device=case.device,
    )
    return adapt(loaded, AdapterSettings(case.rank, case.alpha))


def _train(model: Any, case: Case) -> float:
    """One optimizer step on random tokens of the full length; its seconds."""
    from fedtune.client.torch.training import train_locally
    from fedtune.client.trainer import LocalTask
    from fedtune.data.examples import Example

    random = np.random.default_rng(0)
    vocabulary = int(model.base.network.config.get_text_config().vocab_size)
    first = max(1, round(case.sequence_length * (1.0 - case.target_share)))
    examples = [
        Example(random.integers(0, vocabulary, case.sequence_length).astype(np.int32), first)
        for _ in range(case.micro_batch)
    ]
    task = LocalTask(
        seed=0,
        learning_rate=1e-5,
        local_steps=1,
        batch_tokens=case.sequence_length * case.micro_batch,
        gradient_checkpointing=case.checkpointing,
    )
    start = time.perf_counter()
    train_locally(model, examples, model.layout.initial(0), task)
    return time.perf_counter() - start


if __name__ == "__main__":
    with suppress(OSError):  # where memory runs out the kernel shall end this process, not the one that waits for it
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    print(json.dumps(asdict(run_case(Case(**json.load(sys.stdin))))))
