"""One round without any I/O: what to ask, whom, what came back, and the adapter and record that follow.

    round_ = TrainingRound.open(federation, number, adapter, population)
    for name in round_.cohort: send round_.request to name
    round_.take_in(name, payload)   or   round_.give_up(name, reason)     # each once, in any order
    adapter, record = round_.close()

Clients that were neither taken in nor given up when the round closes did not answer in time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedtune.core.adapter import AdapterLayout, Factors, Vector, adapter_digest
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.job import DEFAULT_LOCAL_STEPS, Job
from fedtune.core.messages import (
    HEADER_BYTES,
    PROTOCOL_VERSION,
    Base,
    EvaluateReply,
    EvaluateRequest,
    LocalWork,
    TrainReply,
    TrainRequest,
    decode,
    encode,
    vector_from_bytes,
    vector_to_bytes,
)
from fedtune.core.records import ClientEvaluation, ClientRecord, Evaluation, RoundRecord
from fedtune.core.seeds import generator
from fedtune.strategies.aggregators import Accumulator, Aggregator
from fedtune.strategies.selection import Selection

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
    """

    job: Job
    base: Base
    layout: AdapterLayout
    aggregator: Aggregator
    selection: Selection


@dataclass
class TrainingRound:
    """A round of training under way; `open` makes it."""

    federation: Federation
    number: int
    adapter: Vector
    cohort: tuple[str, ...]
    factors: Factors
    learning_rate: float
    request: bytes
    accumulator: Accumulator
    observe: Observer
    started: float = field(default_factory=time.monotonic)
    records: dict[str, ClientRecord] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        federation: Federation,
        number: int,
        adapter: Vector,
        population: Sequence[str],
        observe: Observer = lambda _: None,
    ) -> TrainingRound:
        """Chooses the cohort and writes its request.

        Args:
            number: of the round, from 1.
            adapter: float32, the layout's size; it is not changed.
            population: names of the clients that can be reached now.
            observe: called with each client's record as it becomes known.
        """
        factors = federation.aggregator.factors(number)
        learning_rate = scheduled_learning_rate(federation.job, number)
        request = TrainRequest(
            version=PROTOCOL_VERSION,
            job_seed=federation.job.training.seed,
            round=number,
            base=federation.base,
            work=_local_work(federation.job, factors, learning_rate),
            adapter_digest=adapter_digest(adapter),
            adapter=vector_to_bytes(adapter),
        )
        return cls(
            federation,
            number,
            adapter,
            tuple(federation.selection.cohort(number, population)),
            factors,
            learning_rate,
            encode(request),
            federation.aggregator.accumulator(federation.layout, factors),
            observe,
        )

    def take_in(self, name: str, payload: bytes) -> None:
        """Adds one client's reply to the aggregate, or writes down why not; a second reply is ignored."""
        if name not in self.cohort or name in self.records:
            return
        record = self._blank(name, len(payload))
        segment = self.federation.layout.segment(self.factors)
        size = segment.stop - segment.start
        try:
            reply = decode(payload, TrainReply, limit=4 * size + HEADER_BYTES)
            record = replace(
                record, examples=reply.examples, tokens=reply.tokens, loss=reply.loss, seconds=reply.seconds
            )
            if reply.round != self.number:
                raise PeerError(f"an update for round {reply.round}; expected round {self.number}")
            self.accumulator.add(vector_from_bytes(reply.update, size), _weight(self.federation.job, reply))
        except (PeerError, UpdateError) as error:
            record = replace(record, dropped=str(error))
        self._settle(record)

    def give_up(self, name: str, reason: str) -> None:
        """Writes down that a client sends nothing in this round."""
        if name in self.cohort and name not in self.records:
            self._settle(replace(self._blank(name, 0), dropped=reason))

    def close(self) -> tuple[Vector, RoundRecord]:
        """The adapter after this round, the same as before it where too few survived, and the round's record."""
        for name in self.cohort:
            self.give_up(name, LATE)
        clients = tuple(self.records[name] for name in self.cohort)
        survivors = [client for client in clients if client.dropped is None]
        least = self.federation.job.federation.minimum_clients
        adapter, aborted = self.adapter, None
        if len(survivors) < least:
            aborted = f"{len(survivors)} of {len(clients)} clients survived; at least {least} must"
        else:
            adapter = self.adapter.copy()
            adapter[self.federation.layout.segment(self.factors)] += self.accumulator.finish()
        record = RoundRecord(
            round=self.number,
            seconds=time.monotonic() - self.started,
            factors=self.factors,
            learning_rate=self.learning_rate,
            clients=clients,
            train_loss=_mean_loss(survivors),
            aborted=aborted,
        )
        return adapter, record

    def _blank(self, name: str, bytes_up: int) -> ClientRecord:
        return ClientRecord(
            name,
            rank=self.federation.layout.rank,
            answered=time.monotonic() - self.started,
            bytes_up=bytes_up,
            bytes_down=len(self.request),
        )

    def _settle(self, record: ClientRecord) -> None:
        self.records[record.id] = record
        self.observe(record)


@dataclass
class EvaluationRound:
    """Clients evaluate an adapter on what they keep back; the same calls as TrainingRound."""

    number: int
    cohort: tuple[str, ...]
    request: bytes
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)

    @classmethod
    def open(cls, federation: Federation, number: int, adapter: Vector, population: Sequence[str]) -> EvaluationRound:
        """Asks every client, or a random `federation.evaluation_clients` of them where there are more."""
        job = federation.job
        names = sorted(population)
        most = job.federation.evaluation_clients
        if len(names) > most:
            chosen = generator(job.training.seed, "evaluators", number).choice(len(names), most, replace=False)
            names = [names[index] for index in sorted(chosen)]
        request = EvaluateRequest(
            version=PROTOCOL_VERSION,
            job_seed=job.training.seed,
            round=number,
            base=federation.base,
            holdout=job.data.holdout,
            adapter_digest=adapter_digest(adapter),
            adapter=vector_to_bytes(adapter),
        )
        return cls(number, tuple(names), encode(request))

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
        self.evaluations[name] = ClientEvaluation(name, score, len(payload), len(self.request))

    def give_up(self, name: str, reason: str) -> None:  # noqa: ARG002 - an absent score says it
        """Writes down that a client has no score."""
        self.evaluations.setdefault(name, ClientEvaluation(name, None, 0, len(self.request)))

    def close(self) -> tuple[ClientEvaluation, ...]:
        """One entry a client asked, in the order of names."""
        for name in self.cohort:
            self.give_up(name, LATE)
        return tuple(self.evaluations[name] for name in self.cohort)


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


def _local_work(job: Job, factors: Factors, learning_rate: float) -> LocalWork:
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
    )


def _weight(job: Job, reply: TrainReply) -> int:
    match job.federation.weight:
        case "examples":
            return min(reply.examples, job.federation.weight_cap)
        case "tokens":
            return min(reply.tokens, job.federation.weight_cap)
        case "uniform":
            return 1


def _mean_loss(survivors: Sequence[ClientRecord]) -> float | None:
    tokens = sum(client.tokens for client in survivors)
    if not tokens:
        return None
    return sum((client.loss or 0.0) * client.tokens for client in survivors) / tokens
