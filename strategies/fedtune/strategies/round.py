"""One round without any I/O: what to ask, whom, what came back, and the state and record that follow.

    round_ = TrainingRound.open(federation, state, population, broadcast)
    for name in round_.cohort: send round_.requests.payload(name) to name
    round_.take_in(name, payload)   or   round_.give_up(name, reason)     # each once, in any order
    state, record = round_.close()

Clients that were neither taken in nor given up when the round closes did not answer in time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedtune.core.adapter import FACTORS, AdapterLayout, Factors, Vector, factor_letters
from fedtune.core.codec import initial_clip
from fedtune.core.codec.downlink import max_body_size
from fedtune.core.downlink import advance
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.job import DEFAULT_LOCAL_STEPS, Job
from fedtune.core.messages import (
    HEADER_BYTES,
    PROTOCOL_VERSION,
    Base,
    Downlink,
    EvaluateReply,
    EvaluateRequest,
    LocalWork,
    Payload,
    TrainReply,
    TrainRequest,
    Uplink,
    decode,
    encode,
)
from fedtune.core.records import ClientEvaluation, ClientRecord, Evaluation, RoundRecord
from fedtune.core.seeds import generator
from fedtune.core.uplink import Compression, FactorTerms, factor_terms, uplink_weight
from fedtune.strategies.aggregators import NOTHING, Aggregator, FedRot, State
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.reduction import ClearReduction, Clips, Reduction, RingReduction
from fedtune.strategies.selection import Selection
from fedtune.strategies.server_optimizers import Plain, ServerOptimizer

LATE = "no answer before the deadline"

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
    """The payloads of a round: one for each version of the adapter that clients come from, shared by those who do.

    Args:
        broadcast: what is known of the versions that clients hold.
        held: the version that everybody shall hold.
        write: puts an adapter into this round's request.
    """

    def __init__(self, broadcast: Broadcast, held: Vector, write: Callable[[Downlink], Payload]) -> None:
        self.broadcast = broadcast
        self._held = held
        self._write = write
        self._basis: dict[str, str] = {}
        self._payloads: dict[str, bytes] = {}

    def payload(self, name: str) -> bytes:
        """The bytes that go to one client, the same whenever asked."""
        basis = self._basis.setdefault(name, self.broadcast.basis(name))
        if basis not in self._payloads:
            self._payloads[basis] = encode(self._write(self.broadcast.write(basis, self._held)))
        return self._payloads[basis]


@dataclass(frozen=True)
class FederationState:
    """Everything that one round hands to the next.

    Args:
        round: rounds completed.
        adapter: the server's own, the result so far; float32, the layout's size.
        held: the adapter as devices hold it: `adapter`, as far as it has come across.
        clips: factor -> norm to which updates of it are clipped in a ring.
        server: what aggregator and server optimizer keep, by name; float32 vectors.
    """

    round: int
    adapter: Vector
    held: Vector
    clips: Clips
    server: State = field(default_factory=lambda: NOTHING)


@dataclass
class TrainingRound:
    """A round of training under way; `open` makes it."""

    federation: Federation
    state: FederationState
    cohort: tuple[str, ...]
    factors: Factors
    learning_rate: float
    uplink: Uplink
    terms: tuple[FactorTerms, ...]
    requests: Requests
    reduction: Reduction
    observe: Observer
    started: float = field(default_factory=time.monotonic)
    records: dict[str, ClientRecord] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        federation: Federation,
        state: FederationState,
        population: Sequence[str],
        broadcast: Broadcast,
        observe: Observer = lambda _: None,
    ) -> TrainingRound:
        """Chooses the cohort of the round after `state` and writes its requests.

        Args:
            population: names of the clients that can be reached now.
            broadcast: what is known of the versions that clients hold.
            observe: called with each client's record as it becomes known.
        """
        job, layout, number = federation.job, federation.layout, state.round + 1
        factors = federation.aggregator.factors(number)
        learning_rate = scheduled_learning_rate(job, number)
        cohort = tuple(federation.selection.cohort(number, population))
        uplink = _uplink(federation, state, factors, len(cohort))
        terms = factor_terms(uplink, layout, factors, job.training.seed, number)

        def request(adapter: Downlink) -> TrainRequest:
            return TrainRequest(
                version=PROTOCOL_VERSION,
                job_seed=job.training.seed,
                round=number,
                base=federation.base,
                work=_local_work(job, factors, learning_rate, align=isinstance(federation.aggregator, FedRot)),
                uplink=uplink,
                adapter=adapter,
            )

        reduction: Reduction
        if uplink.form == "ring":
            reduction = RingReduction(terms)
        else:
            reduction = ClearReduction(
                federation.aggregator.accumulator(layout, factors, state.adapter, state.server), terms
            )
        requests = Requests(broadcast, state.held, request)
        return cls(federation, state, cohort, factors, learning_rate, uplink, terms, requests, reduction, observe)

    @property
    def number(self) -> int:
        """Rounds count from 1."""
        return self.state.round + 1

    def take_in(self, name: str, payload: bytes) -> None:
        """Adds one client's reply to the aggregate, or writes down why not; a second reply is ignored."""
        if name not in self.cohort or name in self.records:
            return
        record = self._blank(name, len(payload))
        try:
            limit = sum(max_body_size(terms.count) for terms in self.terms) + HEADER_BYTES
            reply = decode(payload, TrainReply, limit)
            record = replace(
                record, examples=reply.examples, tokens=reply.tokens, loss=reply.loss, seconds=reply.seconds
            )
            if reply.round != self.number:
                raise PeerError(f"an update for round {reply.round}; expected round {self.number}")
            if reply.examples < 1:
                raise PeerError("an update that was trained on no examples")
            if len(reply.update) != len(self.terms):
                raise PeerError(f"{len(reply.update)} payloads; expected one for each of the factors {self.factors}")
            self.reduction.take(reply.update, uplink_weight(self.uplink, reply.examples, reply.tokens))
        except (PeerError, UpdateError) as error:
            self.requests.broadcast.lost(name)
            record = replace(record, dropped=str(error))
        else:
            self.requests.broadcast.sent(name, self.state.held)
        self._settle(record)

    def give_up(self, name: str, reason: str) -> None:
        """Writes down that a client sends nothing in this round."""
        if name in self.cohort and name not in self.records:
            self.requests.broadcast.lost(name)
            self._settle(replace(self._blank(name, 0), dropped=reason))

    def close(self) -> tuple[FederationState, RoundRecord]:
        """The state after this round and its record; with too few survivors only the round's number changes."""
        for name in self.cohort:
            self.give_up(name, LATE)
        clients = tuple(self.records[name] for name in self.cohort)
        survivors = [client for client in clients if client.dropped is None]
        least = self.federation.job.federation.minimum_clients
        state, aborted = replace(self.state, round=self.number), None
        if len(survivors) < least:
            aborted = f"{len(survivors)} of {len(clients)} clients survived; at least {least} must"
        else:
            state = self._after()
        record = RoundRecord(
            round=self.number,
            seconds=time.monotonic() - self.started,
            factors=self.factors,
            learning_rate=self.learning_rate,
            clients=clients,
            train_loss=_mean_loss(survivors),
            aborted=aborted,
        )
        return state, record

    def _after(self) -> FederationState:
        layout = self.federation.layout
        aggregate, clips = self.reduction.finish()
        adapter = self.state.adapter.copy()
        server: State = {**self.state.server, **self.reduction.state}
        start = layout.segment(self.factors).start
        for letter in factor_letters(self.factors):
            segment = layout.segment(letter)
            part = aggregate[segment.start - start : segment.stop - start]
            step, server = self.federation.optimizer.step(letter, part, server)
            adapter[segment] += step
        bits = Compression.of(self.federation.job.compression).downlink_bits
        held = advance(layout, self.state.held, adapter, self.factors, bits)
        return FederationState(self.number, adapter, held, self.state.clips | clips, server)

    def _blank(self, name: str, bytes_up: int) -> ClientRecord:
        return ClientRecord(
            name,
            rank=self.federation.layout.rank,
            answered=time.monotonic() - self.started,
            bytes_up=bytes_up,
            bytes_down=len(self.requests.payload(name)),
        )

    def _settle(self, record: ClientRecord) -> None:
        self.records[record.id] = record
        self.observe(record)


@dataclass
class EvaluationRound:
    """Clients evaluate an adapter on what they keep back; the same calls as TrainingRound."""

    number: int
    cohort: tuple[str, ...]
    held: Vector
    requests: Requests
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)

    @classmethod
    def open(
        cls, federation: Federation, state: FederationState, population: Sequence[str], broadcast: Broadcast
    ) -> EvaluationRound:
        """Asks every client, or a random `federation.evaluation_clients` of them where there are more."""
        job = federation.job
        names = sorted(population)
        most = job.federation.evaluation_clients
        if len(names) > most:
            chosen = generator(job.training.seed, "evaluators", state.round).choice(len(names), most, replace=False)
            names = [names[index] for index in sorted(chosen)]

        def request(adapter: Downlink) -> EvaluateRequest:
            return EvaluateRequest(
                version=PROTOCOL_VERSION,
                job_seed=job.training.seed,
                round=state.round,
                base=federation.base,
                holdout=job.data.holdout,
                adapter=adapter,
            )

        return cls(state.round, tuple(names), state.held, Requests(broadcast, state.held, request))

    def take_in(self, name: str, payload: bytes) -> None:
        """Keeps one client's score; one that cannot be read is kept as none."""
        if name not in self.cohort or name in self.evaluations:
            return
        score = None
        try:
            reply = decode(payload, EvaluateReply, limit=HEADER_BYTES)
            if reply.round == self.number and reply.examples:
                score = Evaluation(reply.loss, reply.exact_match, reply.examples, reply.tokens)
        except PeerError:
            pass  # shown without a score; an evaluation changes nothing that a round depends on
        size = len(self.requests.payload(name))
        self.requests.broadcast.sent(name, self.held)
        self.evaluations[name] = ClientEvaluation(name, score, len(payload), size)

    def give_up(self, name: str, reason: str) -> None:
        """Writes down that a client has no score; why is not kept."""
        del reason
        if name in self.cohort and name not in self.evaluations:
            size = len(self.requests.payload(name))
            self.requests.broadcast.lost(name)
            self.evaluations[name] = ClientEvaluation(name, None, 0, size)

    def close(self) -> tuple[ClientEvaluation, ...]:
        """One entry a client asked, in the order of names."""
        for name in self.cohort:
            self.give_up(name, LATE)
        return tuple(self.evaluations[name] for name in self.cohort)


def initial_state(federation: Federation) -> FederationState:
    """Before round 1: A at random from the job's seed, B = 0, and clips that follow from the job alone."""
    job, layout = federation.job, federation.layout
    adapter = layout.initial(job.training.seed)
    steps = job.training.local_steps or DEFAULT_LOCAL_STEPS
    clips: Clips = {
        letter: initial_clip(job.training.learning_rate, steps, half.size).clip
        for letter, half in zip(FACTORS, layout.halves(adapter), strict=True)
    }
    return FederationState(0, adapter, adapter, clips)


def clients_evaluate(job: Job, number: int) -> bool:
    """Whether clients evaluate after this round: as often as the job says, and after the last."""
    every = job.federation.evaluate_clients_every
    return job.data.holdout > 0 and (number == job.federation.rounds or (every > 0 and number % every == 0))


def pooled(evaluations: Sequence[ClientEvaluation]) -> Evaluation | None:
    """All clients' scores as one: loss weighted by target tokens, exact match by examples; None without any score."""
    scores = [part.evaluation for part in evaluations if part.evaluation]
    tokens, examples = sum(score.tokens for score in scores), sum(score.examples for score in scores)
    if not tokens or not examples:
        return None
    return Evaluation(
        loss=sum(score.loss * score.tokens for score in scores) / tokens,
        exact_match=sum(score.exact_match * score.examples for score in scores) / examples,
        examples=examples,
        tokens=tokens,
    )


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


def _local_work(job: Job, factors: Factors, learning_rate: float, align: bool) -> LocalWork:
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
    )


def _uplink(federation: Federation, state: FederationState, factors: Factors, cohort: int) -> Uplink:
    job = federation.job
    compression = Compression.of(job.compression)
    letters = factor_letters(factors)
    earlier = [federation.aggregator.factors(number) for number in range(1, state.round + 1)]
    return Uplink(
        form=compression.form,
        bits=compression.bits,
        density=compression.density,
        error_feedback=compression.error_feedback,
        weight=job.federation.weight,
        weight_cap=job.federation.weight_cap,
        n_max=max(cohort, 1),
        turns=tuple(sum(letter in trained for trained in earlier) for letter in letters),
        clips=tuple(state.clips[letter] for letter in letters),
    )


def _mean_loss(survivors: Sequence[ClientRecord]) -> float | None:
    tokens = sum(client.tokens for client in survivors)
    if not tokens:
        return None
    return sum((client.loss or 0.0) * client.tokens for client in survivors) / tokens
