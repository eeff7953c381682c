"""A backend: a library that can train on this machine, and what a plan has to know of it.

`fedtune.client.torch.torch_backend.TorchBackend` is the one that there is. Another one is a class of this protocol and
of `fedtune.client.trainer.Trainer`; nothing else of planning and serving knows which library computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fedtune.client.plan.step_costs import Choices
from fedtune.client.trainer import Limits, Trainer
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.model.shape import ModelShape, Precision


class WrongBaseError(ModelError):
    """A directory holds another base model than the one that is wanted.

    Args:
        digest: of the base that it holds.
    """

    def __init__(self, digest: str) -> None:
        super().__init__(f"another base model, with digest {digest[:16]}…")
        self.digest = digest


@dataclass(frozen=True)
class Case:
    """Says what to load and to train for a trial step.

    Args:
        model: the base.
        adapter: rank and alpha, on all linear layers.
        choices: of the plan; its tokens are whole examples of its sequence length.
        target_share: share of the tokens that the loss counts.
        threads: the library's.
    """

    model: ModelSettings
    adapter: AdapterSettings
    choices: Choices
    target_share: float = 1.0
    threads: int = 1

    @property
    def micro_batch(self) -> int:
        """Examples of a forward pass."""
        return max(1, self.choices.tokens // self.choices.sequence_length)


@dataclass(frozen=True)
class Measured:
    """Holds what a trial step took, in bytes over the process before it loaded the model, and seconds.

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


class Meter(Protocol):
    """Counts the memory of this process."""

    def reset(self) -> int:
        """Forgets the peak; gives what is held now, bytes."""

    def peak(self) -> int:
        """Gives the peak since the reset, bytes."""


class LimitedTrainer(Trainer, Protocol):
    """A trainer that keeps to a plan's limits of memory, which may change between two calls."""

    limits: Limits


class Backend(Protocol):
    """Trains on this machine, and says how it computes here."""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU; plans then count the GPU's memory."""

    def best_precision(self) -> Precision:
        """Gives the arithmetic that is fastest here."""

    def native_unpacking(self) -> bool:
        """Whether packed weights are unpacked by native code."""

    def reserved_bytes(self) -> int:
        """Counts the memory of the GPU that this process holds and does not use."""

    def product_rate(self, shape: ModelShape, choices: Choices) -> float:
        """Measures operations a second of products of the model's own size, as a training process does them."""

    def warm_up(self) -> None:
        """Brings in what any training brings in: kernels, threads and libraries."""

    def meter(self) -> Meter:
        """Gives the meter that counts what a model takes here."""

    def measure(self, case: Case) -> Measured:
        """Trains one step in a process of its own.

        Raises:
            RunError: the process died, which is what too little memory looks like, or took too long.
        """

    def open(self, model: ModelSettings, adapter: AdapterSettings, choices: Choices, digest: str) -> LimitedTrainer:
        """Loads a base model as the choices hold it.

        Raises:
            WrongBaseError: its digest is another one than `digest`.
            ModelError: it cannot be loaded, or the adapter does not fit it.
        """


def case_from_json(content: dict[str, Any]) -> Case:
    """Reads a case as `dataclasses.asdict` gives it, once through JSON."""
    adapter = dict(content["adapter"])
    if isinstance(adapter["target_modules"], list):
        adapter["target_modules"] = tuple(adapter["target_modules"])
    return Case(
        model=ModelSettings(**content["model"]),
        adapter=AdapterSettings(**adapter),
        choices=Choices(**content["choices"]),
        target_share=content["target_share"],
        threads=content["threads"],
    )
