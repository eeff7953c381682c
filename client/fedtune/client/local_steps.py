"""The steps of a local task, the same for every trainer: their examples, sums, and frozen values.

for step in local_steps(examples, task):
    ...     # one optimizer step on these examples
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.client.trainer import LocalTask
from fedtune.core.adapter.layout import AdapterLayout, Factors, factor_letters
from fedtune.data.batches import steps_of_epoch
from fedtune.data.examples import Example


class StepSums(NamedTuple):
    """The sums of one step: its loss over all targets, its targets and its tokens, padding included."""

    loss: float
    targets: int
    tokens: int


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
