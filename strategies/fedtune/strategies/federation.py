"""A federation: the parts that stay the same throughout a job, and the state that passes from round to round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.codec.update_forms import UpdateForm
from fedtune.core.job.methods import Method
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.round_terms import reachable_norm
from fedtune.core.protocol.messages import Base, Rebasing
from fedtune.core.round_records import Tracker
from fedtune.strategies.aggregation.aggregator import NOTHING, Clips, State
from fedtune.strategies.aggregation.evidence import NO_EVIDENCE, Evidence
from fedtune.strategies.cohorts.selection import Selection
from fedtune.strategies.cohorts.suspicion import UNSUSPECTED, Suspicion
from fedtune.strategies.cohorts.tier_assignment import Ranks
from fedtune.strategies.collection import Collector
from fedtune.strategies.schedule import Schedule
from fedtune.strategies.server_optimizers import ServerOptimizer

AggregateChange = Callable[[AdapterLayout, Factors, Vector], Vector]
"""Changes a round's aggregate before the server takes its step: (layout, factors, aggregate) -> aggregate."""


@dataclass(frozen=True)
class Federation:
    """The parts of a job that stay the same throughout; `fedtune.strategies.assembly` makes it.

    Args:
        terms: the job, with its learning rate set, and the base model, as clients identify it.
        layout: the adapter's.
        form: form in which updates travel up.
        collector: collects and aggregates a cohort's updates.
        selection: chooses the cohort.
        schedule: decides when a round goes on without the missing answers.
        optimizer: takes the server's step.
        ranks: client -> number of rank indices it can train; None where all clients train the whole adapter.
        postprocess: changes to the aggregate, applied in order.
        trackers: observers of clients and rounds.
    """

    terms: JobTerms
    layout: AdapterLayout
    form: UpdateForm
    collector: Collector
    selection: Selection
    schedule: Schedule
    optimizer: ServerOptimizer
    ranks: Ranks | None = None
    postprocess: Sequence[AggregateChange] = ()
    trackers: Sequence[Tracker] = ()

    @property
    def job(self) -> Job:
        """The job."""
        return self.terms.job

    @property
    def base(self) -> Base:
        """The base model that the adapter belongs to."""
        return self.terms.base

    @property
    def method(self) -> Method:
        """The method of the aggregator."""
        return self.collector.aggregator.method


@dataclass(frozen=True)
class FederationState:
    """The state that one round passes to the next.

    Args:
        round: number of completed rounds.
        adapter: the server's own adapter, the result so far; float32, (layout.size,).
        held: the adapter as devices hold it: `adapter` less what has not been sent yet.
        clips: clips of a ring: factor -> norm to which its updates are clipped.
        server: state of the aggregator and the server optimizer, by name; float32 vectors.
        stale_updates: client -> its answer to the round before, which arrived after that had closed.
        rebasing: the last change of the adapter's basis, if any.
        suspicion: which clients may have made secure sums fail, and which did.
        evidence: what the tests of groups tell against clients.
    """

    round: int
    adapter: Vector
    held: Vector
    clips: Clips
    server: State = field(default_factory=lambda: NOTHING)
    stale_updates: Mapping[str, bytes] = field(default_factory=dict)
    rebasing: Rebasing | None = None
    suspicion: Suspicion = UNSUSPECTED
    evidence: Evidence = NO_EVIDENCE


def initial_state(federation: Federation) -> FederationState:
    """Returns the state before round 1: the first adapter, with ΔW = 0, and clips that follow from the job."""
    layout = federation.layout
    adapter = layout.initial(federation.terms.seed)
    clips: Clips = {letter: reachable_norm(federation.job, layout, 1, letter) for letter, _ in layout.segments()}
    return FederationState(0, adapter, adapter, clips)
