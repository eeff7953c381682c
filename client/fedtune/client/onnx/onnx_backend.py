"""The onnxruntime backend: training on edge packs with this machine's processor, without torch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]

from fedtune.client.onnx.edge_tokenizer import EdgeTokenizer
from fedtune.client.onnx.onnx_trainer import OnnxTrainer, open_trainer
from fedtune.client.onnx.trial_step import measure
from fedtune.client.plan.backend import Case, Measured
from fedtune.client.plan.machine import Gpu
from fedtune.client.plan.meter import KeptMeter
from fedtune.client.plan.step_costs import PACK_WEIGHTS, Choices, Form
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.edge.pack_facts import read_facts
from fedtune.model.shape import ModelShape, Precision

QUANTIZATION = "nf4"  # of all packs
_PRODUCT_ROWS = 512
_PRODUCT_SECONDS = 0.2


class OnnxBackend:
    """Implements `fedtune.client.plan.backend.Backend` with onnxruntime."""

    name = "onnxruntime"
    forms: tuple[Form, ...] = (("unpacked", False), ("mapped", False), ("mapped", True))
    on_gpu = False

    def gpus(self) -> tuple[Gpu, ...]:
        """Returns none."""
        return ()

    def shape(self, model: ModelSettings) -> ModelShape:
        """Returns the sizes in a pack's facts.

        Raises:
            ModelError: it is no pack, or the job quantizes the base otherwise.
        """
        if model.quantization != QUANTIZATION:
            raise ModelError(f"{model.base}: an edge pack is in {QUANTIZATION}; the job wants {model.quantization}")
        return replace(read_facts(Path(model.base)).shape, name=model.base)

    def tokenizer(self, base: str) -> EdgeTokenizer:
        """Returns a pack's tokenizer.

        Raises:
            ModelError: it is no pack, or its tokenizer cannot be read.
        """
        return EdgeTokenizer(Path(base), read_facts(Path(base)))

    def best_precision(self) -> Precision:
        """Returns fp32, in which the graphs of packs compute."""
        return "fp32"

    def native_unpacking(self) -> bool:
        """Returns false: numpy unpacks the weights."""
        return False

    def held_bytes(self) -> int:
        """Returns this process's resident set without mapped files, which count as free memory already."""
        memory = psutil.Process().memory_info()
        return int(memory.rss - memory.shared)

    def product_rate(self, shape: ModelShape, choices: Choices) -> float:
        """Measures the operations of products of the model's size in numpy: those of one core, times threads."""
        largest = max(shape.linear, key=lambda module: module.d_in * module.d_out)
        left = np.ones((_PRODUCT_ROWS, largest.d_in), dtype=np.float32)
        right = np.ones((largest.d_in, largest.d_out), dtype=np.float32)
        done, start, busy = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < _PRODUCT_SECONDS:
            left @ right
            done += 1
        of_one_core = 2.0 * _PRODUCT_ROWS * largest.d_in * largest.d_out * done / (time.process_time() - busy)
        return of_one_core * choices.threads

    def warm_up(self) -> None:
        """Does nothing: onnxruntime and numpy are loaded with this module."""

    def meter(self) -> KeptMeter:
        """Returns a meter that leaves out the pages of the pack's weights."""
        return KeptMeter()

    def measure(self, case: Case) -> Measured:
        """Trains one step in a process of its own; raises RunError if that died."""
        return measure(case)

    def open(self, model: ModelSettings, adapter: AdapterSettings, choices: Choices, digest: str) -> OnnxTrainer:
        """Opens a pack.

        Raises:
            WrongBaseError: its base's digest differs from `digest`.
            ModelError: it is no whole pack, or the adapter does not fit the base.
        """
        assert choices.weights in PACK_WEIGHTS
        return open_trainer(Path(model.base), adapter, digest, choices.threads, unpacked=choices.weights == "unpacked")
