"""One client's local training: loads the adapter, takes the steps, and returns the update.

    result = train_locally(model, examples, received, LocalTask(seed, request.work))

The base model stays loaded; a call costs one copy of the adapter and a new AdamW state. The result depends on the
arguments alone: the same call gives the same bits, whatever was trained on the same model before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fedtune.client.local_steps import StepSums, check_start, local_steps, not_owned, result_of
from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import UpdateError
from fedtune.core.job.local_work import LocalWork
from fedtune.data.batches import micro_batches
from fedtune.data.examples import Example
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.loss import completion_loss

_MAX_SKIPPED_STEPS = 16  # in a row: fp16's loss scale starts at 2**16 and halves with each, down to 1


def train_locally(model: AdaptedModel, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
    """Trains the received adapter on the client's examples.

    Args:
        received: the whole adapter, float32, (layout.size,).

    Raises:
        UpdateError: there are no examples, or a loss, a gradient or the update is not finite.
    """
    start = time.perf_counter()
    check_start(examples, received)
    work = task.work
    segment = model.layout.segment(work.factors)
    model.load(received)
    model.train_factors(work.factors)
    trained = nn.Parameter(model.parameters[segment])
    trained.grad = model.gradient[segment]
    anchor = trained.detach().clone()
    frozen = None
    if task.owned is not None:
        frozen = torch.from_numpy(not_owned(model.layout, work.factors, task.owned)).to(model.base.device)
    optimizer = _optimizer(model, trained, work)
    scaler = torch.amp.GradScaler(model.base.device.type, enabled=model.base.precision == "fp16")
    done: list[StepSums] = []
    skipped = 0
    with training_mode(model, task.seed, work.gradient_checkpointing):
        for step in local_steps(examples, task):
            trained.grad.zero_()
            done.append(_accumulate(model, step, task, scaler))
            scaler.unscale_(optimizer)
            if work.proximal:
                trained.grad.add_(trained.detach() - anchor, alpha=work.proximal)
            if frozen is not None:
                trained.grad.masked_fill_(frozen, 0.0)
            norm = float(nn.utils.clip_grad_norm_(trained, work.max_gradient_norm))
            if not math.isfinite(done[-1].loss):
                raise UpdateError(f"the loss is {done[-1].loss} at local step {len(done)}")
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped > (_MAX_SKIPPED_STEPS if scaler.is_enabled() else 0):
                raise UpdateError(f"the gradient's norm is {norm} at local step {len(done)}")
            scaler.step(optimizer)
            scaler.update()
            if frozen is not None and work.weight_decay:  # weight decay also changes values without a gradient
                trained.data[frozen] = anchor[frozen]
    update = trained.detach().cpu().numpy() - received[segment]
    return result_of(update, examples, done, time.perf_counter() - start)


def _optimizer(model: AdaptedModel, trained: nn.Parameter, work: LocalWork) -> torch.optim.Optimizer:
    """Returns a new optimizer of the trained factors.

    Muon's step on a matrix of shape (m, n) is orthogonal, times 0.2·√max(m, n)·η, so that its values have the root mean
    square of an AdamW step of the same η. It moves all directions of R alike, whichever basis the fixed factors chose,
    while AdamW's equal steps in each value let the few directions that inputs share hold back all others.

    Args:
        trained: the segment of the flat vector that is trained; AdamW works on it as a whole.
    """
    if work.optimizer == "muon":
        matrices = model.matrices(work.factors)
        return torch.optim.Muon(
            matrices, lr=work.learning_rate, weight_decay=work.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    return torch.optim.AdamW([trained], lr=work.learning_rate, weight_decay=work.weight_decay, fused=True)


def _accumulate(
    model: AdaptedModel, examples: list[Example], task: LocalTask, scaler: torch.amp.GradScaler
) -> StepSums:
    """Accumulates the gradient of one step's mean loss, micro-batch by micro-batch."""
    targets = sum(example.target_tokens for example in examples)
    loss, tokens = torch.zeros((), device=model.base.device), 0
    for part in micro_batches(examples, task.micro_batch_tokens or task.work.batch_tokens):
        batch = model.lm_head.batch(part)
        part_loss = completion_loss(model.lm_head, batch)
        torch.autograd.backward(scaler.scale(part_loss / targets))
        loss += part_loss.detach()
        tokens += batch.ids.numel()
    return StepSums(float(loss), targets, tokens)


@contextmanager
def training_mode(model: AdaptedModel, seed: int, checkpointing: bool) -> Iterator[None]:
    """Switches to training mode with a separate random stream for dropout, and to evaluation mode afterwards."""
    network = model.base.network
    model.lm_head  # noqa: B018  # its self-check needs evaluation mode
    devices = [model.base.device] if model.base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        network.train()
        if checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if checkpointing:
                network.activation_checkpointing_disable()
            network.eval()
