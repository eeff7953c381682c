"""The trainer interface: an object that holds a base model, trains an adapter on a client's examples, and scores it.

    result = trainer.train(examples, received, LocalTask(seed, request.work))
    score = trainer.evaluate(received, held_out)

All other work of a device, from the received bytes to the encoded update, is the same for every trainer. The trainer
for torch is `fedtune.client.torch.torch_trainer.TorchTrainer`; the one for onnxruntime, which needs no torch, is
`fedtune.client.onnx.onnx_trainer.OnnxTrainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.errors import UpdateError
from fedtune.core.job.local_work import LocalWork
from fedtune.core.round_records import Evaluation
from fedtune.data.examples import Example
from fedtune.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class LocalTask:
    """One client's part of a round.

    Args:
        seed: seed of the order of the examples and of dropout; derive it from job seed, round and client.
        work: local work that the job asks for; the device handles `holdout`, `align` and `deadline` itself.
        owned: rank indices that are trained, where a device trains fewer than all; the others stay frozen.
        micro_batch_tokens: tokens in a forward pass, where memory is short; None for whole steps.
    """

    seed: int
    work: LocalWork
    owned: tuple[int, ...] | None = None
    micro_batch_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class LocalResult:
    """The result of a client's training.

    Args:
        update: trained minus received, float32, the segment of the trained factors; zero at indices that are not owned.
        examples: number of examples that the client trains on; a possible weight for aggregation.
        target_tokens: number of tokens in them that the loss counts; another possible weight.
        loss: mean over the target tokens of all steps, each measured before its own step.
        steps: optimizer steps taken.
        tokens: tokens computed, with padding where there was some.
        seconds: duration from receiving the task to the result.
    """

    update: Vector
    examples: int
    target_tokens: int
    loss: float
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True, eq=False)
class ClientTask:
    """One client's training: the arguments of `Trainer.train`."""

    examples: Sequence[Example]
    received: Vector
    task: LocalTask


Outcome = LocalResult | UpdateError
"""The result of a client's training, or the reason why it gave none that may be sent."""


@dataclass(frozen=True)
class Limits:
    """Memory limits of a device. They change results only by rounding, and cost time.

    Args:
        tokens: most tokens in a forward pass, padding included; None for as many as requested. A longer example is a
            pass of its own.
        checkpointing: whether to recompute activations instead of keeping them, even where the job does not ask for it.
    """

    tokens: int | None = None
    checkpointing: bool = False

    def at_once(self, asked: int) -> int:
        """Returns the tokens of a forward pass for which `asked` tokens are requested."""
        return asked if self.tokens is None else min(asked, self.tokens)


UNLIMITED = Limits()
SHRINK = 4  # divides the micro-batch for the only retry where memory runs out


def out_of_memory(tokens: int) -> str:
    """Returns the message of a trainer whose memory ran out at micro-batches of `tokens`, and at the retry."""
    return f"memory ran out at micro-batches of {tokens} tokens, and again at {max(1, tokens // SHRINK)}"


class Trainer(Protocol):
    """Trains and scores adapters on one base model, one call at a time."""

    @property
    def layout(self) -> AdapterLayout:
        """The position of each factor in the adapter's vector."""

    @property
    def digest(self) -> str:
        """The base model's digest: 64 hexadecimal digits."""

    @property
    def name(self) -> str:
        """The base model's directory or hub id, for messages to people."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer, with which examples are made."""

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        """Trains the received adapter; the same call gives the same bits, whatever was trained before.

        Args:
            received: the whole adapter, float32, (layout.size,).

        Raises:
            UpdateError: training gave no update that may be sent.
        """

    def evaluate(self, adapter: Vector, examples: Sequence[Example]) -> Evaluation:
        """Scores an adapter.

        Args:
            adapter: float32, (layout.size,).
            examples: at least one.
        """
