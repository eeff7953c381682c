"""The composition root: assembles a federation from a job, for simulation, live server and stock Flower alike.

    federation = assemble(job, base, layout, clients, secure=SecureAggregation(...))

A custom part is an object that is passed in place of the one that the job names; there is no registry:

    federation = assemble(job, base, layout, parts=Parts(aggregator=MyAggregator(), selection=MySelection()))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedtune.core.adapter.layout import AdapterLayout
from fedtune.core.codec.noise_seeds import NoiseSeed, of_entropy
from fedtune.core.codec.update_forms import FORMS, RING, UpdateForm
from fedtune.core.codec.uplink import Compression
from fedtune.core.errors import JobError
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.job.secure_cohorts import FEWEST_MEANS
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.core.round_records import Tracker
from fedtune.strategies.aggregation import Aggregator, Decoded, Grouped, RingMean, Unpacked, Update, update_aggregator
from fedtune.strategies.aggregation.central_noise import CentrallyNoised
from fedtune.strategies.cohorts.selection import AmongPresent, Rationed, Selection, UniformSelection, cohort_size
from fedtune.strategies.cohorts.tier_assignment import Ranks
from fedtune.strategies.cohorts.timed_selection import timed_selection
from fedtune.strategies.collection import Collector, InTheClear
from fedtune.strategies.federation import AggregateChange, Federation
from fedtune.strategies.schedule import ByDeadline, Schedule, Synchronous
from fedtune.strategies.secure_sum import SecureAggregation, SecureSum
from fedtune.strategies.server_optimizers import ServerOptimizer, server_optimizer_named

Around = Callable[[Aggregator[Any]], Aggregator[Any]]
Present = Callable[[int, Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Clients:
    """The knowledge about clients by which cohorts are chosen; every field may be unknown.

    Args:
        count: number of clients.
        ranks: client -> number of rank indices it can train; None where all clients train the whole adapter.
        seconds: client -> predicted seconds of a round; entries may be added as clients register. None without
            predictions.
        present: (round number, names) -> the clients that are available; None where all are.
        virtual_time: whether rounds pass on a virtual clock, which closes them itself.
    """

    count: int = 0
    ranks: Ranks | None = None
    seconds: Mapping[str, float] | None = None
    present: Present | None = None
    virtual_time: bool = False


def unchanged(aggregator: Aggregator[Any]) -> Aggregator[Any]:
    """Returns the aggregator itself, with no other around it."""
    return aggregator


@dataclass(frozen=True)
class Parts:
    """Custom parts in place of those that the job names; None keeps the job's.

    Args:
        aggregator: aggregator of decoded updates; a job whose updates travel as words of a ring refuses it.
        around: puts an aggregator, such as one that adds noise, around the innermost one: `Mean` and its kind in the
            clear, `RingMean` in a ring and under masks.
        form: form in which updates travel; the devices must have the same one.
        postprocess: changes to the aggregate before the server takes its step.
        trackers: observers of clients and rounds.
    """

    aggregator: Aggregator[Update] | None = None
    around: Around = unchanged
    form: UpdateForm | None = None
    selection: Selection | None = None
    schedule: Schedule | None = None
    optimizer: ServerOptimizer | None = None
    postprocess: Sequence[AggregateChange] = ()
    trackers: Sequence[Tracker] = ()


ANY_CLIENTS, NO_PARTS = Clients(), Parts()


def assemble(
    job: Job,
    base: Base,
    layout: AdapterLayout,
    clients: Clients = ANY_CLIENTS,
    *,
    secure: SecureAggregation | None = None,
    parts: Parts = NO_PARTS,
    noise: NoiseSeed = of_entropy,
) -> Federation:
    """Returns the federation that a job describes.

    Args:
        base: the base model that the adapter belongs to, as clients identify it.
        secure: inputs of secure aggregation, required exactly where the job enables it; without it updates travel in
            the clear.
        noise: gives the seeds of noise that the server adds.

    Raises:
        JobError: the job needs something that is missing here: identities for secure aggregation, predicted times for
            a timed selection, or single updates under masks.
    """
    form = parts.form or FORMS[Compression.of(job).form]
    selection = parts.selection or _selection(job, clients)
    terms = JobTerms(with_learning_rate(job, layout), base)
    if job.privacy.mode == "central":
        parts = replace(parts, around=_noised(parts.around, noise))
    settings, collector = job.federation, _collector(terms, form, secure, parts)
    if clients.ranks is not None and len(job.tiers) > 1 and (reason := collector.aggregator.method.equal_ranks):
        raise JobError([f"the aggregator {reason}, but clients train the tiers {list(job.tiers)}; expected one tier"])
    return Federation(
        terms=terms,
        layout=layout,
        form=form,
        collector=collector,
        selection=AmongPresent(selection, clients.present) if clients.present else selection,
        schedule=parts.schedule or (Synchronous() if clients.virtual_time else ByDeadline(job)),
        optimizer=parts.optimizer or server_optimizer_named(settings.server_optimizer, settings.server_learning_rate),
        ranks=clients.ranks,
        postprocess=parts.postprocess,
        trackers=parts.trackers,
    )


def _collector(terms: JobTerms, form: UpdateForm, secure: SecureAggregation | None, parts: Parts) -> Collector:
    """Returns the nesting that the job and the parts describe.

    Under masks SecureSum(Grouped(around(RingMean), aggregator)), in a ring InTheClear(Unpacked(around(RingMean))),
    otherwise InTheClear(Decoded(around(aggregator), form)).
    """
    job = terms.job
    if job.secure_aggregation.enabled != (secure is not None):
        problem = "secure_aggregation.enabled must be true with the identities of the devices, and false without them"
        raise JobError([problem])
    aggregator = parts.aggregator or update_aggregator(job.federation)
    if form != RING:
        if secure is not None:
            raise JobError([f"updates of the form {form.name} cannot be masked; expected a ring"])
        return InTheClear(Decoded(parts.around(aggregator), form), job.federation)
    grouped = secure is not None and job.secure_aggregation.groups >= FEWEST_MEANS
    declared = AGGREGATIONS[job.federation.aggregation] if grouped else aggregator.method
    if parts.aggregator or declared.sees_updates:
        problem = f"the aggregator {declared.sees_updates or 'takes one update at a time'}, but "
        raise JobError([problem + "updates travel as words of a ring; expected one that needs no more than their sum"])
    ring = parts.around(RingMean(declared))
    if secure is not None:
        return SecureSum(Grouped(ring, aggregator), terms.digest, secure, job.secure_aggregation)
    return InTheClear(Unpacked(ring), job.federation)


def _noised(around: Around, noise: NoiseSeed) -> Around:
    """Returns the same way to put aggregators around one, which comes with noise of the server's."""
    return lambda aggregator: around(CentrallyNoised(aggregator, noise))


def _selection(job: Job, clients: Clients) -> Selection:
    settings = job.federation
    if settings.selection == "uniform":
        uniform = UniformSelection(settings.clients_per_round, job.training.seed)
        return uniform if job.privacy.mode == "off" else Rationed(uniform, job.privacy.participations)
    if clients.seconds is None:
        problem = f'federation.selection is "{settings.selection}", but nothing here predicts how long clients take'
        raise JobError([f'{problem}; expected "uniform", a live fleet, or a simulated one (simulation.fleet)'])
    return timed_selection(job, cohort_size(settings.clients_per_round, clients.count), clients.seconds)
