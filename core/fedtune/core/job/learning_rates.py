"""The default learning rate, which depends on the width of the base model and the kind of the adapter.

    job = with_learning_rate(job, layout)       # unchanged where training.learning_rate is set

A step of AdamW changes every weight by about the learning rate, and the output of a layer by that times its number of
inputs: wider models want smaller steps. `benchmarks/learning_rate` measures the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedtune.core.adapter.layout import AdapterKind, AdapterLayout
from fedtune.core.job.settings import Job

LEARNING_RATES: Mapping[AdapterKind, Sequence[tuple[float, float]]] = {
    "lora": ((320, 2e-3), (480, 1e-3), (800, 5e-4), (math.inf, 2e-4)),
    "core": ((math.inf, 3e-2),),  # its scale is that of the weights, and Muon's step that of its rank
}
"""Kind of adapter -> (largest width of the base, learning rate of round 1), by ascending width."""


def default_learning_rate(width: int, kind: AdapterKind) -> float:
    """Returns the learning rate for a base of this width and an adapter of this kind."""
    return next(rate for widest, rate in LEARNING_RATES[kind] if width <= widest)


def width_of(layout: AdapterLayout) -> int:
    """Returns the width of the base: the number of inputs that most of the adapted layers have."""
    counts = Counter(module.d_in for module in layout.modules)
    return min(counts, key=lambda width: (-counts[width], width))


def with_learning_rate(job: Job, layout: AdapterLayout) -> Job:
    """Returns the job with its learning rate set: its own, or the default for its adapter on its base."""
    if job.training.learning_rate is not None:
        return job
    training = dataclasses.replace(job.training, learning_rate=default_learning_rate(width_of(layout), layout.kind))
    return dataclasses.replace(job, training=training)
