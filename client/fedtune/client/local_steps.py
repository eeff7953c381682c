"""The parts of a local task that are the same for every trainer: its checks, the examples of each step, and its result.

check_start(examples, received)
for step in local_steps(examples, task):
    ...     # one optimizer step on these examples, whose StepSums are kept
result = result_of(update, examples, done, seconds)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector, factor_letters
from fedtune.core.errors import UpdateError
from fedtune.data.batches import steps_of_epoch
from fedtune.data.examples import Example


class StepSums(NamedTuple):
    """The sums of one step: its loss over all targets, its targets and the tokens that were computed."""

    loss: float
    targets: int
    tokens: int


def check_start(examples: Sequence[Example], received: Vector) -> None:
    """Checks that training can begin.

    Raises:
        UpdateError: there are no examples, or the received adapter is not finite.
    """
    if not examples:
        raise UpdateError("the client has no examples to train on")
    if not np.isfinite(received).all():
        raise UpdateError("the received adapter is not finite")


def local_steps(examples: Sequence[Example], task: LocalTask) -> Iterator[list[Example]]:
    """Yields the examples of each optimizer step, each epoch in a new order, until the task is done."""
    work, done, epoch = task.work, 0, 0
    limit = work.local_steps
    while epoch == 0 or done < limit:
        steps = steps_of_epoch(examples, work.batch_tokens, task.seed, epoch)
        if work.local_epochs:
            limit = max(1, round(work.local_epochs * len(steps)))
        yield from steps[: limit - done]
        done += len(steps)
        epoch += 1


def not_owned(layout: AdapterLayout, factors: Factors, owned: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Returns a mask over the segment of the trained factors: True where the device owns nothing."""
    segment = layout.segment(factors)
    frozen = np.ones(segment.stop - segment.start, dtype=np.bool_)
    for letter in factor_letters(factors):
        start = layout.segment(letter).start - segment.start
        frozen[start + layout.coordinates(letter, np.asarray(owned, dtype=np.intp))] = False
    return frozen


def result_of(update: Vector, examples: Sequence[Example], done: Sequence[StepSums], seconds: float) -> LocalResult:
    """Returns the result of training.

    Args:
        update: trained minus received, of the trained factors.
        done: the sums of all steps.

    Raises:
        UpdateError: the update is not finite.
    """
    if not np.isfinite(update).all():
        raise UpdateError(f"the update is not finite after {len(done)} local steps")
    return LocalResult(
        update=update,
        examples=len(examples),
        target_tokens=sum(example.target_tokens for example in examples),
        loss=sum(step.loss for step in done) / sum(step.targets for step in done),
        steps=len(done),
        tokens=sum(step.tokens for step in done),
        seconds=seconds,
    )
