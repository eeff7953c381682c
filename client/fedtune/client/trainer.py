"""A trainer: the base model that a device holds, and how it trains an adapter on a client's examples.

    result = trainer.train(examples, received, LocalTask(seed, request.work))
    score = trainer.evaluate(received, held_out)

Everything else that a device does, from the received bytes to the encoded update, is the same for every trainer. The
one that computes with torch is `fedtune.client.torch.torch_trainer.TorchTrainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.job.local_work import LocalWork
from fedtune.core.round_records import Evaluation
from fedtune.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LocalTask:
    """One client's part of a round.

    Args:
        seed: of the order of the examples and of dropout; derive it from job seed, round and client.
        work: what the job asks for; the device sees to `holdout`, `align` and `deadline` itself.
        owned: rank indices that are trained, where a device trains fewer than all; the rest takes part frozen.
        micro_batch_tokens: tokens a forward pass, where memory is short; None for whole steps.
    """

    seed: int
    work: LocalWork
    owned: tuple[int, ...] | None = None
    micro_batch_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class LocalResult:
    """Holds what a client's training came to.

    Args:
        update: trained minus received, float32, the segment of the trained factors; zero at indices that are not owned.
        examples: how many examples the client trains on: a weight for aggregation.
        target_tokens: tokens that the loss counts in those examples: another.
        loss: mean over the target tokens of all steps, each before its own step.
        steps: optimizer steps taken.
        tokens: tokens computed, padding included.
        seconds: from receiving to result.
    """

    update: Vector
    examples: int
    target_tokens: int
    loss: float
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Limits:
    """How a device keeps to its memory. What is computed stays the same up to rounding; it only takes longer.

    Args:
        tokens: of a forward pass at most, padding included; None for as many as are asked for. An example that is
            longer is a pass of its own.
        checkpointing: compute activations twice rather than keep them, even where that is not asked for.
    """

    tokens: int | None = None
    checkpointing: bool = False

    def at_once(self, asked: int) -> int:
        """Tokens of a forward pass, where so many are asked for."""
        return asked if self.tokens is None else min(asked, self.tokens)


UNLIMITED = Limits()


class Trainer(Protocol):
    """Trains and scores adapters on one base model, one call at a time."""

    @property
    def layout(self) -> AdapterLayout:
        """Where each factor lies in the adapter's vector."""

    @property
    def digest(self) -> str:
        """The base model's digest: 64 hexadecimal digits."""

    @property
    def name(self) -> str:
        """The base model's directory or hub id, for messages to people."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, which examples are made with."""

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        """Trains the received adapter; the same call gives the same bits, whoever was trained before.

        Args:
            received: the whole adapter, float32, (layout.size,).

        Raises:
            UpdateError: training gave nothing that may be sent.
        """

    def evaluate(self, adapter: Vector, examples: Sequence[Example]) -> Evaluation:
        """Scores an adapter.

        Args:
            adapter: float32, (layout.size,).
            examples: at least one.
        """
