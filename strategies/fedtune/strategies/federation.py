"""A federation: what stays the same all through a job, and what one round hands to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.core.adapter.layout import FACTORS, AdapterLayout, Factors, Vector
from fedtune.core.codec import initial_clip
from fedtune.core.codec.clipping import FIRST_WEIGHT_CAP
from fedtune.core.codec.update_forms import UpdateForm
from fedtune.core.job.methods import Method
from fedtune.core.job.settings import Job
from fedtune.core.protocol.payloads import Base, Rebasing
from fedtune.core.round_records import Tracker
from fedtune.strategies.aggregation.aggregator import NOTHING, Clips, State
from fedtune.strategies.aggregation.payload_sums import WEIGHT
from fedtune.strategies.cohorts.selection import Selection
from fedtune.strategies.cohorts.tier_assignment import Ranks
from fedtune.strategies.collection import Collector
from fedtune.strategies.schedule import Schedule
from fedtune.strategies.server_optimizers import ServerOptimizer

Postprocess = Callable[[AdapterLayout, Factors, Vector], Vector]
"""Changes a round's aggregate before the server takes its step: (layout, factors, aggregate) -> aggregate."""


@dataclass(frozen=True)
class Federation:
    """Everything that stays the same all through a job; `fedtune.strategies.assembly` makes it.

    Args:
        job: learning rate, weights and seed are read from it.
        base: tells clients which base model the adapter belongs to.
        layout: the adapter's.
        form: that updates travel up in.
        collector: gets one aggregate out of a cohort.
        selection: chooses the cohort.
        schedule: says when a round goes on without those who have not answered.
        optimizer: takes the server's step.
        ranks: how many rank indices each client can train; None where all train everything.
        postprocess: changes to the aggregate, one after the other.
        trackers: told of each client and each round.
    """

    job: Job
    base: Base
    layout: AdapterLayout
    form: UpdateForm
    collector: Collector
    selection: Selection
    schedule: Schedule
    optimizer: ServerOptimizer
    ranks: Ranks | None = None
    postprocess: Sequence[Postprocess] = ()
    trackers: Sequence[Tracker] = ()

    @property
    def method(self) -> Method:
        """The declaration of how updates become one."""
        return self.collector.aggregator.method


@dataclass(frozen=True)
class FederationState:
    """Everything that one round hands to the next.

    Args:
        round: rounds completed.
        adapter: the server's own, the result so far; float32, the layout's size.
        held: the adapter as devices hold it: `adapter`, as far as it has come across.
        clips: of a ring: factor -> norm to which updates of it are clipped; WEIGHT -> where weights are capped.
        server: what aggregator and server optimizer keep, by name; float32 vectors.
        stale_updates: client -> its answer to the round before, which came when that had closed.
        rebasing: the last change of the adapter's basis, if there was one.
    """

    round: int
    adapter: Vector
    held: Vector
    clips: Clips
    server: State = field(default_factory=lambda: NOTHING)
    stale_updates: Mapping[str, bytes] = field(default_factory=dict)
    rebasing: Rebasing | None = None


def initial_state(federation: Federation) -> FederationState:
    """The state before round 1: A at random from the job's seed, B = 0, and clips that follow from the job alone."""
    job, layout = federation.job, federation.layout
    adapter = layout.initial(job.training.seed)
    clips: Clips = {
        letter: initial_clip(job.training.learning_rate, job.training.steps, half.size).clip
        for letter, half in zip(FACTORS, layout.halves(adapter), strict=True)
    }
    return FederationState(0, adapter, adapter, clips | {WEIGHT: FIRST_WEIGHT_CAP[job.federation.weight]})


def scheduled_learning_rate(job: Job, number: int) -> float:
    """The learning rate of a round: η, η·(1 - p) or η·(1 + cos πp)/2, with p = (number - 1) / rounds."""
    progress = min((number - 1) / job.federation.rounds, 1.0)
    match job.training.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = (1.0 + math.cos(math.pi * progress)) / 2
    return job.training.learning_rate * factor
