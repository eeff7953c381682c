"""The torch backend: training on this machine's first GPU, or on its processor."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import torch

from fedtune.client.plan.backend import Case, Measured, Meter, WrongBaseError
from fedtune.client.plan.machine import Gpu
from fedtune.client.plan.planner import UNPACKING_FORMS
from fedtune.client.plan.step_costs import Choices
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.torch.trial_step import device_of, load, measure, meter_for, warm_up
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.job_inputs import source_of
from fedtune.data.tokenizer import Tokenizer
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import DTYPES, best_precision, load_tokenizer, quiet
from fedtune.model.nf4 import bitsandbytes_works
from fedtune.model.shape import ModelShape, Precision, shape_of

_PRODUCT_ROWS = 512
_PRODUCT_SECONDS = 0.2


class TorchBackend:
    """Implements `fedtune.client.plan.backend.Backend` with torch.

    Args:
        device: device on which torch computes; None for the first GPU, or the processor.
    """

    name = "torch"
    forms = UNPACKING_FORMS

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def on_gpu(self) -> bool:
        """True if torch computes on a GPU."""
        return self._device.type == "cuda"

    def gpus(self) -> tuple[Gpu, ...]:
        """Returns all GPUs that torch sees, where it computes on one."""
        return tuple(_gpus()) if self.on_gpu else ()

    def shape(self, model: ModelSettings) -> ModelShape:
        """Returns the sizes of a base model, from its configuration."""
        return shape_of(model)

    def tokenizer(self, base: str) -> Tokenizer:
        """Returns a base model's tokenizer."""
        with quiet():
            return load_tokenizer(source_of(base))

    def best_precision(self) -> Precision:
        """Returns bf16 where the hardware multiplies it natively, fp16 on older GPUs, fp32 otherwise."""
        return best_precision(self._device)

    def native_unpacking(self) -> bool:
        """Returns whether bitsandbytes works here."""
        return bitsandbytes_works(self._device.type)

    def held_bytes(self) -> int:
        """Returns the bytes that torch's allocator holds on the GPU, or this process's resident set."""
        return torch.cuda.memory_reserved() if self.on_gpu else int(psutil.Process().memory_info().rss)

    def product_rate(self, shape: ModelShape, choices: Choices) -> float:
        """Measures the operations per second of products of the model's size, on the threads of the choices."""
        threads = torch.get_num_threads()
        torch.set_num_threads(choices.threads)
        try:
            return _product_rate(shape, choices)
        finally:
            torch.set_num_threads(threads)

    def warm_up(self) -> None:
        """Trains the bundled model for a step."""
        warm_up(self.best_precision(), self._device)

    def meter(self) -> Meter:
        """Returns the resident set's meter, or the GPU allocator's."""
        return meter_for(self._device)

    def measure(self, case: Case) -> Measured:
        """Trains one step in a process of its own; raises RunError if that died."""
        return measure(case)

    def open(self, model: ModelSettings, adapter: AdapterSettings, choices: Choices, digest: str) -> TorchTrainer:
        """Loads a base model in the form that the choices name.

        Raises:
            WrongBaseError: its digest differs from `digest`.
            ModelError: it cannot be loaded, or the adapter does not fit it.
        """
        loaded = load(model, choices, self._device)
        if loaded.digest != digest:
            raise WrongBaseError(loaded.digest)
        if not self.on_gpu:
            torch.set_num_threads(choices.threads)
        return TorchTrainer(adapt(loaded, adapter))


def _product_rate(shape: ModelShape, choices: Choices) -> float:
    device, dtype = device_of(choices), DTYPES[choices.precision]
    largest = max(shape.linear, key=lambda module: module.d_in * module.d_out)
    left = torch.randn(_PRODUCT_ROWS, largest.d_in, device=device).to(dtype)
    right = torch.randn(largest.d_out, largest.d_in, device=device).to(dtype)
    torch.nn.functional.linear(left, right)  # kernels are chosen at the first call
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _PRODUCT_SECONDS:
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
    return 2.0 * _PRODUCT_ROWS * largest.d_in * largest.d_out * done / elapsed


def _gpus() -> Iterator[Gpu]:
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield Gpu(torch.cuda.get_device_name(index), total, free, torch.cuda.get_device_capability(index))
