"""The backend interface: a library that trains on this machine, with the facts that a plan needs about it.

`fedtune.client.torch.torch_backend.TorchBackend` trains model directories, and
`fedtune.client.onnx.onnx_backend.OnnxBackend` edge packs. Another one implements this protocol and
`fedtune.client.trainer.Trainer`; planning and serving depend on no library otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedtune.client.plan.machine import Gpu
from fedtune.client.plan.step_costs import Choices, Form
from fedtune.client.trainer import Limits, Trainer
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.tokenizer import Tokenizer
from fedtune.model.shape import ModelShape, Precision


class WrongBaseError(ModelError):
    """A directory holds another base model than the expected one.

    Args:
        digest: digest of the base model found there.
    """

    def __init__(self, digest: str) -> None:
        super().__init__(f"another base model, with digest {digest[:16]}…")
        self.digest = digest


@dataclass(frozen=True)
class Case:
    """The configuration of a trial step: the model to load, and the step to train.

    Args:
        model: the base model.
        adapter: rank and alpha, on all linear layers.
        choices: the plan's choices; their tokens are whole examples of their sequence length.
        target_share: share of the tokens that the loss counts.
        cores: the most threads that are tried.
    """

    model: ModelSettings
    adapter: AdapterSettings
    choices: Choices
    target_share: float = 1.0
    cores: int = 1

    @property
    def micro_batch(self) -> int:
        """Number of examples in a forward pass."""
        return max(1, self.choices.tokens // self.choices.sequence_length)


@dataclass(frozen=True)
class Measured:
    """Measurements of a trial step: bytes above those of the process before it loaded the model, and seconds.

    Args:
        runtime: bytes of the process before that.
        loading: peak while the model was read and packed.
        resident: bytes after that.
        training: peak of the steps.
        step_seconds: the shortest of all steps but the first.
        tokens: tokens of a step.
        threads: the number with which it took so long, the fastest of those that were tried.
    """

    runtime: int
    loading: int
    resident: int
    training: int
    step_seconds: float
    tokens: int
    threads: int

    @property
    def peak(self) -> int:
        """The higher of the two peaks."""
        return max(self.loading, self.training)


class Meter(Protocol):
    """A meter of this process's memory."""

    def reset(self) -> int:
        """Resets the peak; returns the bytes that are held now."""

    def peak(self) -> int:
        """Returns the peak since the reset, in bytes."""


class LimitedTrainer(Trainer, Protocol):
    """A trainer with memory limits, which may change between two calls."""

    limits: Limits


class Backend(Protocol):
    """A library that trains on this machine."""

    @property
    def name(self) -> str:
        """The library's name, for people."""

    @property
    def forms(self) -> Sequence[Form]:
        """The forms in which it can hold a base model and its activations, the fastest first."""

    @property
    def on_gpu(self) -> bool:
        """True if it computes on a GPU; plans then count the GPU's memory."""

    def gpus(self) -> tuple[Gpu, ...]:
        """Returns the GPUs on which it computes, with their free memory; nothing if it computes on none."""

    def shape(self, model: ModelSettings) -> ModelShape:
        """Returns the sizes of a base model, without loading its weights.

        Raises:
            ModelError: it is no base model of this library's, or its sizes cannot be read.
        """

    def tokenizer(self, base: str) -> Tokenizer:
        """Returns the tokenizer of a base model, without loading its weights.

        Raises:
            ModelError: it has none.
        """

    def best_precision(self) -> Precision:
        """Returns the arithmetic that is fastest on this machine."""

    def native_unpacking(self) -> bool:
        """Returns whether packed weights are unpacked by native code."""

    def held_bytes(self) -> int:
        """Returns the bytes that this process already holds and a new plan may use, of the memory that plans count."""

    def product_rate(self, shape: ModelShape, choices: Choices) -> float:
        """Measures the operations per second of products of the model's size, under the conditions of training."""

    def warm_up(self) -> None:
        """Loads everything that any training needs: kernels, threads and libraries."""

    def meter(self) -> Meter:
        """Returns the meter for the memory in which models are loaded."""

    def measure(self, case: Case) -> Measured:
        """Trains one step in a process of its own.

        Raises:
            RunError: the process died, as it does when memory runs out, or took too long.
        """

    def open(self, model: ModelSettings, adapter: AdapterSettings, choices: Choices, digest: str) -> LimitedTrainer:
        """Loads a base model in the form that the choices name.

        Raises:
            WrongBaseError: its digest differs from `digest`.
            ModelError: it cannot be loaded, or the adapter does not fit it.
        """


class Backends(Protocol):
    """The libraries of this machine, one for each form of a base model."""

    def installed(self, base: str) -> bool:
        """Returns whether the library for a base model is installed, without importing it."""

    def of(self, base: str) -> Backend:
        """Returns the library for a base model: a directory, a hub id or "demo".

        Raises:
            MissingExtraError: it is not installed.
        """


def case_from_json(content: dict[str, Any]) -> Case:
    """Reads a case from the output of `dataclasses.asdict`, after a round trip through JSON."""
    adapter = dict(content["adapter"])
    if isinstance(adapter["target_modules"], list):
        adapter["target_modules"] = tuple(adapter["target_modules"])
    return Case(
        model=ModelSettings(**content["model"]),
        adapter=AdapterSettings(**adapter),
        choices=Choices(**content["choices"]),
        target_share=content["target_share"],
        cores=content["cores"],
    )
