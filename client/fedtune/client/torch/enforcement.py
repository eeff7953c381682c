"""Training within a device's memory: under its plan's limits, and where memory runs out in spite of them, once more.

The gradient of a step does not depend on how it is cut into micro-batches, so what a device sends stays the same up to
rounding; it only takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedtune.client.torch.training import LocalResult, LocalTask, train_locally
from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import UpdateError
from fedtune.data.examples import Example
from fedtune.model.lora import AdaptedModel

SHRINK = 4  # to a quarter: memory was short, and there is one more try
_CPU_MESSAGE = "can't allocate memory"  # of torch's CPU allocator, which has no exception of its own


def train_within_memory(
    model: AdaptedModel, examples: Sequence[Example], received: Vector, task: LocalTask
) -> LocalResult:
    """`train_locally` under the model's limits, once more with a quarter of the micro-batch where memory ran out.

    The smaller micro-batch stays the model's limit.

    Raises:
        UpdateError: as `train_locally`, and where memory ran out again; the message has the sizes that were tried.
    """
    first = model.limits.at_once(task.micro_batch_tokens or task.batch_tokens)
    smaller = max(1, first // SHRINK)
    checkpointing = task.gradient_checkpointing or model.limits.checkpointing
    task = replace(task, micro_batch_tokens=first, gradient_checkpointing=checkpointing)
    try:
        return train_locally(model, examples, received, task)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler, whose traceback would keep the failed step's tensors alive.
    if model.base.device.type == "cuda":
        torch.cuda.empty_cache()
    model.limits = replace(model.limits, tokens=smaller)
    try:
        return train_locally(model, examples, received, replace(task, micro_batch_tokens=smaller))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise UpdateError(f"memory ran out at micro-batches of {first} tokens, and again at {smaller}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_MESSAGE in str(error)
