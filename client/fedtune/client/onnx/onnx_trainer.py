"""The onnxruntime trainer: `fedtune.client.trainer.Trainer` without torch, on an edge pack.

    trainer = open_trainer(Path("packs/SmolLM2-135M"), job.adapter)

Like the torch trainer it retries once under smaller limits where memory runs out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from fedtune.client.onnx.edge_network import EdgeNetwork
from fedtune.client.onnx.edge_tokenizer import EdgeTokenizer
from fedtune.client.onnx.edge_training import train_on_pack
from fedtune.client.plan.backend import WrongBaseError
from fedtune.client.trainer import SHRINK, UNLIMITED, Limits, LocalResult, LocalTask, out_of_memory
from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.errors import InputError, UpdateError
from fedtune.core.job.settings import AdapterSettings
from fedtune.core.round_records import Evaluation
from fedtune.data.batches import collate, micro_batches
from fedtune.data.examples import Example
from fedtune.edge.pack import open_pack

_EVALUATION_TOKENS = 512  # tokens that an evaluation computes at once
_ALLOCATION_FAILED = ("bad_alloc", "Failed to allocate memory")  # of onnxruntime's kernels, and of its allocators


class OnnxTrainer:
    """Trains and scores adapters on an edge pack.

    Args:
        network: base model with an adapter, which is swapped; the trainer must be its only user.
        limits: memory limits; they shrink where memory runs out, and a plan may set others.
    """

    def __init__(self, network: EdgeNetwork, limits: Limits = UNLIMITED) -> None:
        self.network = network
        self.limits = limits
        self._tokenizer = EdgeTokenizer(network.pack.directory, network.pack.facts)

    @property
    def layout(self) -> AdapterLayout:
        """The adapter's."""
        return self.network.layout

    @property
    def digest(self) -> str:
        """The base model's."""
        return self.network.pack.facts.base_digest

    @property
    def name(self) -> str:
        """The directory or hub id of the base model that was packed."""
        return self.network.pack.facts.shape.name

    @property
    def tokenizer(self) -> EdgeTokenizer:
        """The base model's."""
        return self._tokenizer

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        """Trains under the limits, and retries once where memory ran out: with a quarter of the micro-batch, and with
        activations computed again, which then stay the limits.

        Raises:
            UpdateError: as in `train_on_pack`, and where memory ran out again; the message has the sizes tried.
        """
        first = self.limits.at_once(task.micro_batch_tokens or task.work.batch_tokens)
        checkpointing = task.work.gradient_checkpointing or self.limits.checkpointing
        for limits in (self.limits, Limits(max(1, first // SHRINK), checkpointing=True)):
            self.limits = limits
            work = msgspec.structs.replace(task.work, gradient_checkpointing=checkpointing or limits.checkpointing)
            limited = replace(task, work=work, micro_batch_tokens=limits.at_once(first))
            try:
                return train_on_pack(self.network, examples, received, limited)
            except Exception as error:  # onnxruntime's errors share no base class
                if not is_out_of_memory(error):
                    raise
        raise UpdateError(out_of_memory(first))

    def evaluate(self, adapter: Vector, examples: Sequence[Example]) -> Evaluation:
        """Scores an adapter in batches within the limits.

        Raises:
            InputError: there are no examples.
        """
        if not examples:
            raise InputError("there is no example to evaluate on")
        self.network.load(adapter)
        loss, tokens, exact = 0.0, 0, 0
        for part in micro_batches(examples, self.limits.at_once(_EVALUATION_TOKENS)):
            batch = collate(part)
            losses, right = self.network.score(batch)
            wrong = np.bincount(batch.owners, weights=~right, minlength=len(part))
            loss += float(losses.sum(dtype=np.float64))
            tokens += len(losses)
            exact += int((wrong == 0).sum())
        return Evaluation(loss / tokens, exact / len(examples), len(examples), tokens)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether numpy or onnxruntime failed to allocate memory; onnxruntime says so in words only."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _ALLOCATION_FAILED)


def open_trainer(
    directory: Path, adapter: AdapterSettings, digest: str | None = None, threads: int = 1, *, unpacked: bool = False
) -> OnnxTrainer:
    """Opens an edge pack for training.

    Args:
        digest: digest of the base model that is expected; None for any.
        threads: number of onnxruntime's threads.
        unpacked: whether to unpack the weights once, where memory permits, instead of for every use.

    Raises:
        WrongBaseError: the pack's base has another digest.
        ModelError: it is no whole pack, onnxruntime is too old for it, or the adapter does not fit the base.
    """
    pack = open_pack(directory)
    if digest is not None and pack.facts.base_digest != digest:
        raise WrongBaseError(pack.facts.base_digest)
    return OnnxTrainer(EdgeNetwork(pack, pack.layout(adapter), threads, unpacked=unpacked))
