"""One round without any I/O: what to ask, whom, what came back, and the state and record that follow.

    round_ = TrainingRound.open(federation, state, population, broadcast)
    for exchange in round_.exchanges():                                   # one in the clear, five with masks
        for name, parts in exchange.requests.items(): send parts to name
        round_.take_in(name, payload)   or   round_.give_up(name, reason)     # each once, in any order
    state, record = round_.close()

Clients that were neither taken in nor given up when an exchange ends did not answer in time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from fedtune.core.adapter.layout import FACTORS, AdapterLayout, Factors, Vector, adapter_digest, factor_letters
from fedtune.core.adapter.rebalance import basis_changes, changed, follow
from fedtune.core.codec import initial_clip
from fedtune.core.codec.adaptive_ranges import FIRST_WEIGHT_CAP
from fedtune.core.codec.downlink import FIRST, advance, refreshed
from fedtune.core.codec.uplink import Compression, FactorTerms, factor_terms, round_slices
from fedtune.core.errors import JobError, PeerError, RunError, UpdateError
from fedtune.core.job.settings import DEFAULT_LOCAL_STEPS, Job
from fedtune.core.ledger import Ledger
from fedtune.core.protocol.actions import TRAIN
from fedtune.core.protocol.payloads import (
    PROTOCOL_VERSION,
    Base,
    Downlink,
    LocalWork,
    Payload,
    Rebasing,
    TrainRequest,
    Uplink,
    encode,
)
from fedtune.core.round_records import ClientRecord, RoundRecord
from fedtune.core.secagg import RoundAbortedError
from fedtune.core.secagg.graph import part
from fedtune.strategies.aggregation import NOTHING, Aggregator, FedRot, State
from fedtune.strategies.aggregation.reduction import WEIGHT, ClearReduction, Clips, Reduction, RingReduction
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.cohorts.selection import Selection, cohort_size
from fedtune.strategies.cohorts.tier_assignment import Ranks, TierAssignment, all_alike, assign_tiers
from fedtune.strategies.collection import Asked, ClearCollection, Collected, Collection
from fedtune.strategies.exchange import Closing, Exchange
from fedtune.strategies.secure_collection import SecureAggregation, SecureCollection
from fedtune.strategies.server_optimizers import Plain, ServerOptimizer

LATE = "no answer before the deadline"
ABORTED = "the round was aborted"
SAT_OUT = "sat out: no tier of this round for it"

NO_TIERS: Mapping[str, int] = {}

Observer = Callable[[ClientRecord], None]


@dataclass(frozen=True)
class Federation:
    """What stays the same all through a job.

    Args:
        job: learning rate, schedule, weights and seed are read from it.
        base: what tells clients which base model the adapter belongs to.
        layout: the adapter's.
        aggregator: what a round trains, and how updates become one.
        selection: who is asked.
        optimizer: what the server makes of the aggregate.
    """

    job: Job
    base: Base
    layout: AdapterLayout
    aggregator: Aggregator
    selection: Selection
    optimizer: ServerOptimizer = field(default_factory=Plain)


class Requests:
    """The payloads of a round: one for each version of the adapter that clients come from and each tier they train,
    shared by those who do.

    Args:
        broadcast: what is known of the versions that clients hold.
        held: the version that everybody shall hold.
        write: puts an adapter and a tier into this round's request.
        tiers: client -> the tier it trains; those that are missing have tier 0, as all have where all are alike.
    """

    def __init__(
        self,
        broadcast: Broadcast,
        held: Vector,
        write: Callable[[Downlink, int], Payload],
        tiers: Mapping[str, int] = NO_TIERS,
    ) -> None:
        self.broadcast = broadcast
        self._held = held
        self._write = write
        self._tiers = tiers
        self._basis: dict[str, str] = {}
        self._adapters: dict[str, Downlink] = {}
        self._payloads: dict[tuple[str, int], bytes] = {}

    def payload(self, name: str) -> bytes:
        """The bytes that go to one client, the same whenever asked."""
        basis, tier = self._basis.setdefault(name, self.broadcast.basis(name)), self._tiers.get(name, 0)
        if (basis, tier) not in self._payloads:
            if basis not in self._adapters:
                self._adapters[basis] = self.broadcast.write(basis, self._held)
            self._payloads[basis, tier] = encode(self._write(self._adapters[basis], tier))
        return self._payloads[basis, tier]


@dataclass(frozen=True)
class FederationState:
    """Everything that one round hands to the next.

    Args:
        round: rounds completed.
        adapter: the server's own, the result so far; float32, the layout's size.
        held: the adapter as devices hold it: `adapter`, as far as it has come across.
        clips: of a ring: factor -> norm to which updates of it are clipped; WEIGHT -> where weights are capped.
        server: what aggregator and server optimizer keep, by name; float32 vectors.
        stale: client -> its answer to the round before, which came when that had closed.
        rebasing: the last change of the adapter's basis, if there was one.
    """

    round: int
    adapter: Vector
    held: Vector
    clips: Clips
    server: State = field(default_factory=lambda: NOTHING)
    stale_updates: Mapping[str, bytes] = field(default_factory=dict)
    rebasing: Rebasing | None = None


class TrainingRound:
    """A round of training under way; `open` makes it.

    Args:
        collection: how the cohort's updates become one.
        observe: called with each client's record as its update comes in or is given up.
        closing: when training goes on without those who have not answered.
    """

    def __init__(
        self,
        federation: Federation,
        state: FederationState,
        factors: Factors,
        terms: tuple[FactorTerms, ...],
        requests: Requests,
        assignment: TierAssignment,
        collection: Collection,
        observe: Observer = lambda _: None,
        closing: Closing | None = None,
    ) -> None:
        self.federation = federation
        self.state = state
        self.factors = factors
        self.terms = terms
        self.requests = requests
        self.cohort = tuple(assignment.trained)
        self._assignment = assignment
        self._collection = collection
        self._observe = observe
        self._closing = closing
        self._started = time.monotonic()
        self._records = {
            name: ClientRecord(name, tier=assignment.own[name], rank=tier) for name, tier in assignment.trained.items()
        }
        self._settled: set[str] = set()  # whose update is in, or will not come
        self._exchange: Exchange | None = None
        self._waiting: set[str] = set()
        self._aborted: str | None = None
        self._stale: dict[str, bytes] = {}
        for name, tier in assignment.trained.items():
            if not tier:
                self._settle(name, dropped=SAT_OUT)

    @classmethod
    def open(
        cls,
        federation: Federation,
        state: FederationState,
        population: Sequence[str],
        broadcast: Broadcast,
        observe: Observer = lambda _: None,
        secure: SecureAggregation | None = None,
        ranks: Ranks | None = None,
    ) -> TrainingRound:
        """Chooses the cohort of the round after `state` and writes its requests.

        Args:
            population: names of the clients that can be reached now.
            broadcast: what is known of the versions that clients hold.
            observe: called with each client's record as it becomes known.
            secure: what secure aggregation needs; without it updates are collected in the clear.
            ranks: how many rank indices each client can train; without it, all.
        """
        job, layout, number = federation.job, federation.layout, state.round + 1
        factors = federation.aggregator.factors(number)
        learning_rate = scheduled_learning_rate(job, number)
        cohort = tuple(federation.selection.cohort(number, population))
        assignment = assign_tiers(cohort, ranks, job) if ranks else all_alike(cohort, layout.rank)
        trained = {name: tier for name, tier in assignment.trained.items() if tier}
        mixed = assignment.tiers != (layout.rank,)
        deadline = federation.selection.deadline(population)
        uplink = _uplink(federation, state, factors, len(trained), assignment.tiers if mixed else ())
        terms = factor_terms(uplink, layout, factors, job.training.seed, number)

        def request(adapter: Downlink, tier: int) -> TrainRequest:
            return TrainRequest(
                version=PROTOCOL_VERSION,
                job_seed=job.training.seed,
                round=number,
                base=federation.base,
                work=_local_work(job, factors, learning_rate, isinstance(federation.aggregator, FedRot), deadline),
                uplink=uplink,
                adapter=adapter,
                tier=tier,
                rebasing=state.rebasing,
            )

        tiers = trained if mixed else dict.fromkeys(trained, 0)
        requests = Requests(broadcast, state.held, request, tiers)
        asked = {name: Asked(requests.payload(name), tier) for name, tier in tiers.items()}
        collection: Collection
        if secure is not None:
            nobodys = Downlink(FIRST, adapter_digest(state.held), (b"", b""))  # how it travels differs between clients
            collection = SecureCollection(secure, job, federation.base, request(nobodys, 0), terms, asked)
        else:
            reduction: Reduction
            if uplink.form == "ring":
                reduction = RingReduction(terms)
            else:
                slices = round_slices(uplink, layout, job.training.seed, number)
                accumulator = federation.aggregator.accumulator(layout, factors, state.adapter, state.server, slices)
                reduction = ClearReduction(accumulator, terms)
            collection = ClearCollection(number, uplink, reduction, terms, asked, state.stale_updates)
        wanted = cohort_size(federation.selection.wanted, len(population))
        closing = None if deadline is None else _closing(job, deadline, wanted, len(trained))
        return cls(federation, state, factors, terms, requests, assignment, collection, observe, closing)

    @property
    def number(self) -> int:
        """Rounds count from 1."""
        return self.state.round + 1

    def exchanges(self) -> Iterator[Exchange]:
        """What to ask, one exchange after the other; who has not answered when the next one is fetched is late."""
        try:
            for exchange in self._collection.exchanges():
                if exchange.message_type == TRAIN:
                    exchange = replace(exchange, closing=self._closing)
                self._exchange, self._waiting = exchange, set(exchange.requests)
                for name, parts in exchange.requests.items():
                    for purpose, part in zip(exchange.down, parts, strict=True):
                        self._count(name, self._records[name].traffic.sent(purpose, len(part)))
                yield exchange
                for name in sorted(self._waiting):
                    self.give_up(name, LATE)
        except (RoundAbortedError, JobError) as error:
            self._aborted = str(error)

    def take_in(self, name: str, payload: bytes) -> None:
        """Takes one client's answer to the exchange, or writes down why not; a second answer is ignored."""
        if self._exchange is None or name not in self._waiting:
            return
        exchange = self._exchange
        self._count(name, self._records[name].traffic.received(exchange.up, len(payload)))
        try:
            facts = self._collection.take(name, payload)
        except (PeerError, UpdateError) as error:
            self.give_up(name, str(error))
            return
        self._waiting.discard(name)
        if exchange.carries_adapter:
            self.requests.broadcast.sent(name, self.state.held)
        if facts is not None:
            self._settle(name, examples=facts.examples, tokens=facts.tokens, loss=facts.loss, seconds=facts.seconds)

    def give_up(self, name: str, reason: str) -> None:
        """Writes down that a client does not answer; an update of it that is in already stays in."""
        if self._exchange is None or name not in self._waiting:
            return
        self._waiting.discard(name)
        if self._exchange.carries_adapter:
            self.requests.broadcast.lost(name)
        if name not in self._settled:
            self._settle(name, dropped=reason)

    def take_stale(self, name: str, payload: bytes) -> None:
        """Keeps the answer of a client that was given up for being late; the next round may use it."""
        if name in self._settled and self._records[name].dropped is not None and name not in self._stale:
            self._count(name, self._records[name].traffic.received("update", len(payload)))
            self._stale[name] = payload
            self.requests.broadcast.sent(name, self.state.held)

    def close(self) -> tuple[FederationState, RoundRecord]:
        """The state after this round and its record; where it came to nothing only the round's number changes."""
        for name in self.cohort:
            self.give_up(name, LATE)
            if name not in self._settled:
                self._settle(name, dropped=ABORTED)
        clients = tuple(self._records[name] for name in self.cohort)
        survivors = [client for client in clients if client.dropped is None]
        least = self.federation.job.federation.minimum_clients
        state, collected, aborted = replace(self.state, round=self.number), None, self._aborted
        notes = self._assignment.notes
        if aborted is None and len(survivors) < least:
            aborted = f"{len(survivors)} of {len(clients)} clients survived; at least {least} must"
        if aborted is None:
            try:
                collected = self._collection.finish(survivors)
            except (PeerError, RunError) as error:
                aborted = str(error)
        if collected is not None:
            state, changes = self._rebalanced(self._after(collected))
            notes += collected.notes + changes
        state = replace(state, stale_updates=self._stale)
        record = RoundRecord(
            round=self.number,
            seconds=time.monotonic() - self._started,
            factors=self.factors,
            learning_rate=scheduled_learning_rate(self.federation.job, self.number),
            clients=clients,
            train_loss=collected.train_loss if collected else None,
            aborted=aborted,
            secure=collected.secure if collected else None,
            notes=notes,
        )
        return state, record

    def _after(self, collected: Collected) -> FederationState:
        layout = self.federation.layout
        adapter = self.state.adapter.copy()
        server: State = {**self.state.server, **collected.state}
        start = layout.segment(self.factors).start
        for letter in factor_letters(self.factors):
            segment = layout.segment(letter)
            part = collected.aggregate[segment.start - start : segment.stop - start]
            step, server = self.federation.optimizer.step(letter, part, server)
            adapter[segment] += step
        bits = Compression.of(self.federation.job).downlink_bits
        held = advance(layout, self.state.held, adapter, self.factors, bits)
        clips = self.state.clips | collected.clips
        return FederationState(self.number, adapter, held, clips, server, rebasing=self.state.rebasing)

    def _rebalanced(self, state: FederationState) -> tuple[FederationState, tuple[str, ...]]:
        """The state in a balanced basis, where it is time for that, and what there is to say about it.

        The change follows from the adapter that the round's devices held, so that they can make it, too.
        """
        job, layout = self.federation.job, self.federation.layout
        every = job.federation.rebalance_every
        if not every or self.number % every:
            return state, ()
        changes = basis_changes(layout, self.state.held)
        adapter = changed(layout, changes, state.adapter)
        if np.array_equal(adapter, state.adapter):
            return state, ()
        server, lost = self.federation.optimizer.rebased(state.server, partial(follow, layout, changes))
        before = state.rebasing.round if state.rebasing else 0
        after = replace(
            state,
            adapter=adapter,
            held=refreshed(layout, adapter, Compression.of(job).downlink_bits),
            server=server,
            rebasing=Rebasing(self.number, adapter_digest(self.state.held), before),
        )
        return after, ("the adapter's basis was rebalanced", *([lost] if lost else []))

    def _count(self, name: str, traffic: Ledger) -> None:
        self._records[name] = replace(self._records[name], traffic=traffic)

    def _settle(self, name: str, **known: Any) -> None:
        self._settled.add(name)
        answered = time.monotonic() - self._started
        self._records[name] = replace(self._records[name], answered=answered, **known)
        self._observe(self._records[name])


def initial_state(federation: Federation) -> FederationState:
    """Before round 1: A at random from the job's seed, B = 0, and clips that follow from the job alone."""
    job, layout = federation.job, federation.layout
    adapter = layout.initial(job.training.seed)
    steps = job.training.local_steps or DEFAULT_LOCAL_STEPS
    clips: Clips = {
        letter: initial_clip(job.training.learning_rate, steps, half.size).clip
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


def _closing(job: Job, deadline: float, wanted: int, cohort: int) -> Closing:
    """A round that has what it wanted goes on; one past its deadline, too, unless that was missed by so many that
    the sum could not be opened, or by half of those wanted: then it was wrong."""
    secure = job.secure_aggregation
    least = cohort - part(secure.max_dropout, cohort) if secure.enabled else math.ceil(wanted / 2)
    least = min(max(least, job.federation.minimum_clients), cohort)
    return Closing(deadline, max(wanted, least), least)


def _local_work(job: Job, factors: Factors, learning_rate: float, align: bool, deadline: float | None) -> LocalWork:
    training = job.training
    epochs = training.local_epochs
    return LocalWork(
        factors=factors,
        local_steps=0 if epochs is not None else training.local_steps or DEFAULT_LOCAL_STEPS,
        local_epochs=epochs or 0.0,
        batch_tokens=training.batch_tokens,
        learning_rate=learning_rate,
        weight_decay=training.weight_decay,
        max_gradient_norm=training.max_gradient_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        holdout=job.data.holdout,
        proximal=training.proximal,
        align=align,
        deadline=deadline or 0.0,
    )


def _uplink(
    federation: Federation, state: FederationState, factors: Factors, clients: int, tiers: tuple[int, ...]
) -> Uplink:
    job = federation.job
    compression = Compression.of(job)
    cap, letters = job.federation.weight_cap, factor_letters(factors)
    earlier = [federation.aggregator.factors(number) for number in range(1, state.round + 1)]
    return Uplink(
        form=compression.form,
        bits=compression.bits,
        density=compression.density,
        error_feedback=compression.error_feedback,
        weight=job.federation.weight,
        weight_cap=min(cap, round(state.clips[WEIGHT])) if compression.form == "ring" else cap,
        n_max=max(clients, 1),
        selection_phases=tuple(sum(letter in trained for trained in earlier) for letter in letters),
        clips=tuple(state.clips[letter] for letter in letters),
        rotation=compression.rotation,
        tiers=tiers,
    )
