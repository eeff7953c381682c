"""The torch trainer: trains within memory limits, and retries once under smaller ones where memory runs out.

    trainer = TorchTrainer(adapt(base, job.adapter), Limits(tokens=512))

The gradient of a step does not depend on its division into micro-batches, so limits change the update only by rounding,
and cost time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch

from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import SHRINK, UNLIMITED, Limits, LocalResult, LocalTask, out_of_memory
from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.errors import UpdateError
from fedtune.core.round_records import Evaluation
from fedtune.data.examples import Example
from fedtune.data.tokenizer import Tokenizer
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.scoring import evaluate, evaluation_tokens

_CPU_MESSAGE = "can't allocate memory"  # from torch's CPU allocator, which has no exception type of its own


class TorchTrainer:
    """Trains and scores adapters on an adapted model.

    Args:
        model: adapted model, whose adapter is swapped; the trainer must be its only user.
        limits: memory limits; they shrink where memory runs out, and a plan may set others.
    """

    def __init__(self, model: AdaptedModel, limits: Limits = UNLIMITED) -> None:
        self.model = model
        self.limits = limits

    @property
    def layout(self) -> AdapterLayout:
        """The adapter's."""
        return self.model.layout

    @property
    def digest(self) -> str:
        """The base model's."""
        return self.model.base.digest

    @property
    def name(self) -> str:
        """The base model's directory or hub id."""
        return self.model.base.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's."""
        return self.model.base.tokenizer

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        """Trains under the limits, and retries once with a quarter of the micro-batch where memory ran out.

        The smaller micro-batch stays the limit.

        Raises:
            UpdateError: as in `train_locally`, and where memory ran out again; the message has the sizes tried.
        """
        first = self.limits.at_once(task.micro_batch_tokens or task.work.batch_tokens)
        smaller = max(1, first // SHRINK)
        checkpointing = task.work.gradient_checkpointing or self.limits.checkpointing
        work = msgspec.structs.replace(task.work, gradient_checkpointing=checkpointing)
        task = replace(task, work=work, micro_batch_tokens=first)
        try:
            return train_locally(self.model, examples, received, task)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the failed step's tensors alive.
        if self.model.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self.limits = replace(self.limits, tokens=smaller)
        try:
            return train_locally(self.model, examples, received, replace(task, micro_batch_tokens=smaller))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise UpdateError(out_of_memory(first))

    def evaluate(self, adapter: Vector, examples: Sequence[Example]) -> Evaluation:
        """Scores an adapter in batches within the limits.

        Raises:
            InputError: there are no examples.
        """
        self.model.load(adapter)
        return evaluate(self.model, examples, self.limits.at_once(evaluation_tokens(self.model.base.device)))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether torch failed to allocate memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_MESSAGE in str(error)
