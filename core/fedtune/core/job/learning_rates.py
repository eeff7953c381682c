"""The default learning rate, which depends on the width of the base model, the adapter's kind and the optimizer.

    job = with_learning_rate(job, layout)       # unchanged where training.learning_rate is set

A step of AdamW changes every weight by about the learning rate, and the output of a layer by that times its number of
inputs: wider models want smaller steps. `benchmarks/learning_rate` measures the table at width 256, and
`benchmarks/real` at 576, where it searches rates for its rows; the wider ones follow the trend.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedtune.core.adapter.layout import AdapterKind, AdapterLayout
from fedtune.core.job.local_work import OPTIMIZERS, Optimizer
from fedtune.core.job.settings import Job

_LORA = ((320, 2e-3), (800, 1e-3), (1600, 5e-4), (math.inf, 2e-4))
LEARNING_RATES: Mapping[tuple[AdapterKind, Optimizer], Sequence[tuple[float, float]]] = {
    ("lora", "adamw"): _LORA,
    ("lora", "muon"): _LORA,  # its steps have the root mean square of AdamW's
    ("core", "muon"): ((math.inf, 3e-2),),  # a core's scale is that of the weights, and Muon's step that of its rank
    ("core", "adamw"): ((math.inf, 1e-2),),
}
"""Kind of adapter, optimizer -> (largest width of the base, learning rate of round 1), by ascending width."""


def default_learning_rate(width: int, kind: AdapterKind, optimizer: Optimizer | None = None) -> float:
    """Returns the learning rate for a base of this width; without an optimizer for the one of the adapter's kind."""
    rates = LEARNING_RATES[kind, optimizer or OPTIMIZERS[kind]]
    return next(rate for widest, rate in rates if width <= widest)


def width_of(layout: AdapterLayout) -> int:
    """Returns the width of the base: the number of inputs that most of the adapted layers have."""
    counts = Counter(module.d_in for module in layout.modules)
    return min(counts, key=lambda width: (-counts[width], width))


def with_learning_rate(job: Job, layout: AdapterLayout) -> Job:
    """Returns the job with its learning rate set: its own, or the default for its adapter on its base."""
    if job.training.learning_rate is not None:
        return job
    rate = default_learning_rate(width_of(layout), layout.kind, job.training.optimizer)
    training = dataclasses.replace(job.training, learning_rate=rate)
    return dataclasses.replace(job, training=training)
