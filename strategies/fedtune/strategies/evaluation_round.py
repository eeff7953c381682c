"""One evaluation by the clients, without I/O: the requests, the answers, and the pooled score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import PeerError
from fedtune.core.job.settings import Job
from fedtune.core.ledger import Ledger
from fedtune.core.protocol.messages import (
    EVALUATE,
    HEADER_BYTES,
    PROTOCOL_VERSION,
    Downlink,
    EvaluateReply,
    EvaluateRequest,
    decode,
)
from fedtune.core.round_records import ClientEvaluation, Evaluation
from fedtune.core.seeds import generator
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.collection import Exchange
from fedtune.strategies.federation import Federation, FederationState
from fedtune.strategies.requests import Requests
from fedtune.strategies.round import LATE


@dataclass
class EvaluationRound:
    """The evaluation of an adapter by clients on their held-out examples; it has the same methods as TrainingRound."""

    number: int
    cohort: tuple[str, ...]
    held: Vector
    requests: Requests
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)

    @classmethod
    def open(
        cls, federation: Federation, state: FederationState, population: Sequence[str], broadcast: Broadcast
    ) -> EvaluationRound:
        """Opens an evaluation by all clients, or by `federation.evaluation_clients` random ones if there are more."""
        job = federation.job
        names = sorted(population)
        most = job.federation.evaluation_clients
        if len(names) > most:
            chosen = generator(job.training.seed, "evaluators", state.round).choice(len(names), most, replace=False)
            names = [names[index] for index in sorted(chosen)]

        def request(adapter: Downlink, _: int) -> EvaluateRequest:
            return EvaluateRequest(
                version=PROTOCOL_VERSION,
                job_seed=federation.terms.seed,
                round=state.round,
                base=federation.base,
                holdout=job.data.holdout,
                adapter=adapter,
            )

        return cls(state.round, tuple(names), state.held, Requests(broadcast, state.held, request))

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the only exchange."""
        requests = {name: (self.requests.payload(name),) for name in self.cohort}
        yield Exchange(EVALUATE, requests, ("evaluation",), "evaluation", HEADER_BYTES)

    def take_in(self, name: str, payload: bytes) -> None:
        """Records one client's score; an unreadable answer counts as none."""
        if name not in self.cohort or name in self.evaluations:
            return
        self.requests.broadcast.sent(name, self.held)
        traffic = self._asked(name).received("evaluation", len(payload))
        self.evaluations[name] = ClientEvaluation(name, self._score(payload), traffic)

    def give_up(self, name: str, reason: str) -> None:
        """Records that a client has no score; the reason is not kept."""
        del reason
        if name in self.cohort and name not in self.evaluations:
            self.requests.broadcast.lost(name)
            self.evaluations[name] = ClientEvaluation(name, None, self._asked(name))

    def close(self) -> tuple[ClientEvaluation, ...]:
        """Returns one entry for each client that was asked, in the order of names."""
        for name in self.cohort:
            self.give_up(name, LATE)
        return tuple(self.evaluations[name] for name in self.cohort)

    def _asked(self, name: str) -> Ledger:
        return Ledger().sent("evaluation", len(self.requests.payload(name)))

    def _score(self, payload: bytes) -> Evaluation | None:
        try:
            reply = decode(payload, EvaluateReply, limit=HEADER_BYTES)
        except PeerError:
            return None  # listed without a score; no round depends on an evaluation
        if reply.round != self.number or not reply.examples:
            return None
        return Evaluation(reply.loss, reply.exact_match, reply.examples, reply.tokens)


def clients_evaluate(job: Job, number: int) -> bool:
    """Returns whether clients evaluate after this round: as often as the job says, and after the last round.

    Under differential privacy they never do: a score is a client's data without noise.
    """
    if job.privacy.mode != "off":
        return False
    every = job.federation.evaluate_clients_every
    return job.data.holdout > 0 and (number == job.federation.rounds or (every > 0 and number % every == 0))


def scored_sets(job: Job) -> str:
    """Returns the examples from which the job's scores come, in words: the server's, the clients', or none."""
    sets = [f"the server's held-out examples (data.evaluation = {job.data.evaluation})"] if job.data.evaluation else []
    if clients_evaluate(job, job.federation.rounds):
        share = f"data.holdout = {job.data.holdout:g} of each client's"
        every = job.federation.evaluate_clients_every
        when = f"every {every} rounds and after the last" if every else "after the last round"
        sets.append(f"examples that clients keep back ({share}), {when}")
    nobody = (
        "the server has no examples (data.evaluation), and clients score none (data.holdout; never under [privacy])"
    )
    return " and from ".join(sets) or f"none: {nobody}"


def pooled(evaluations: Sequence[ClientEvaluation]) -> Evaluation | None:
    """Returns the mean of all scores: loss weighted by target tokens, exact match by examples; None without a score."""
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
