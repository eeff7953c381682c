"""One client's local training on an edge pack: the loop of `fedtune.client.torch.training` in numpy.

    result = train_on_pack(network, examples, received, LocalTask(seed, request.work))

The update equals the torch trainer's on the same base up to the rounding of float32, which AdamW enlarges where a
gradient is small, and Muon to that of bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from fedtune.client.local_steps import StepSums, check_start, local_steps, not_owned, result_of
from fedtune.client.onnx.edge_network import EdgeNetwork
from fedtune.client.onnx.numpy_optimizers import AdamW, Muon, Optimizer
from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.adapter.layout import Extent, Vector
from fedtune.core.errors import UpdateError
from fedtune.core.job.local_work import LocalWork
from fedtune.data.batches import collate, micro_batches
from fedtune.data.examples import Example

_CLIPPING_EPSILON = 1e-6  # torch's


def train_on_pack(network: EdgeNetwork, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
    """Trains the received adapter on the client's examples.

    Args:
        received: the whole adapter, float32, (layout.size,).

    Raises:
        UpdateError: there are no examples, or a loss, a gradient or the update is not finite.
    """
    start = time.perf_counter()
    check_start(examples, received)
    work, layout = task.work, network.layout
    segment = layout.segment(work.factors)
    vector = received.copy()
    network.load(vector)
    trained, anchor = vector[segment], received[segment]
    gradient = np.zeros_like(vector)
    owned_gradient = gradient[segment]
    frozen = None if task.owned is None else not_owned(layout, work.factors, task.owned)
    optimizer = _optimizer(network, work)
    done: list[StepSums] = []
    for step in local_steps(examples, task):
        gradient[:] = 0.0
        done.append(_accumulate(network, step, task, gradient))
        if work.proximal:
            owned_gradient += np.float32(work.proximal) * (trained - anchor)
        if frozen is not None:
            owned_gradient[frozen] = 0.0
        norm = float(np.linalg.norm(owned_gradient))
        if not math.isfinite(done[-1].loss):
            raise UpdateError(f"the loss is {done[-1].loss} at local step {len(done)}")
        if not math.isfinite(norm):
            raise UpdateError(f"the gradient's norm is {norm} at local step {len(done)}")
        owned_gradient *= np.float32(min(1.0, work.max_gradient_norm / (norm + _CLIPPING_EPSILON)))
        optimizer.step(trained, owned_gradient)
        if frozen is not None and work.weight_decay:  # weight decay also changes values without a gradient
            trained[frozen] = anchor[frozen]
    update = trained - anchor
    return result_of(update, examples, done, time.perf_counter() - start)


def _optimizer(network: EdgeNetwork, work: LocalWork) -> Optimizer:
    segment = network.layout.segment(work.factors)
    size = segment.stop - segment.start
    if work.optimizer == "adamw":
        return AdamW(work, size)
    matrices = [
        Extent(slice(extent.where.start - segment.start, extent.where.stop - segment.start), extent.shape)
        for extent in network.extents(work.factors)
    ]
    return Muon(work, matrices, size)


def _accumulate(network: EdgeNetwork, examples: list[Example], task: LocalTask, gradient: Vector) -> StepSums:
    """Adds the gradient of one step's mean loss, micro-batch by micro-batch."""
    targets = sum(example.target_tokens for example in examples)
    loss, tokens = 0.0, 0
    for part in micro_batches(examples, task.micro_batch_tokens or task.work.batch_tokens):
        batch = collate(part)
        loss += network.add_gradient(
            batch, 1.0 / targets, task.work.factors, gradient, checkpointing=task.work.gradient_checkpointing
        )
        tokens += batch.ids.size
    return StepSums(loss, targets, tokens)
