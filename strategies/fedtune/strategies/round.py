"""One round without I/O: a state machine for each client of the cohort, and the resulting state and record.

    round_ = TrainingRound.open(federation, state, population, broadcast)
    for exchange in round_.exchanges():                                   # one in the clear, five under masks
        for name, parts in exchange.requests.items(): send parts to name
        round_.take_in(name, payload)   or   round_.give_up(name, reason)     # each once, in any order
    state, record = round_.close()

Clients that were neither taken in nor given up when an exchange ends did not answer in time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial

import numpy as np

from fedtune.core.adapter.basis import basis_changes, changed, follow
from fedtune.core.adapter.layout import adapter_digest, factor_letters
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.codec.downlink import FIRST
from fedtune.core.errors import JobError, PeerError, RunError, UpdateError
from fedtune.core.ledger import Ledger
from fedtune.core.protocol.messages import Downlink, Rebasing
from fedtune.core.round_records import ClientRecord, RoundRecord
from fedtune.core.secagg import RoundAbortedError
from fedtune.core.spans import span
from fedtune.strategies.aggregation.aggregator import Aggregate, Frame, State
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.cohorts.suspicion import GroupOutcome
from fedtune.strategies.collection import NO_FACTS, ClientFacts, Collected, Collection, Exchange, Inputs
from fedtune.strategies.federation import Federation, FederationState
from fedtune.strategies.requests import Requests, RoundPlan, plan_round, train_request

LATE = "no answer before the deadline"
ABORTED = "the round was aborted"
SAT_OUT = "sat out: no tier of this round for it"


class Phase(Enum):
    """The phase of one client in a round."""

    IDLE = "idle"  # it owes no answer, and its update is not in
    ASKED = "asked"  # its update is not in, and it owes an answer
    IN = "in"  # its update is in
    ASKED_AGAIN = "asked again"  # its update is in, and it owes an answer to a later exchange
    OUT = "out"  # its update will not come


class Event(Enum):
    """An event that moves one client from phase to phase."""

    ASK = "ask"  # an exchange begins
    ANSWER = "answer"  # it answered, and there is more to come
    UPDATE = "update"  # it answered, and its update is in
    GIVE_UP = "give up"  # it does not answer, or its answer is unusable
    EXCLUDE = "exclude"  # it is not asked, or the round is aborted before its update is in
    LOSE = "lose"  # its update is in, but its group has no sum, and others have one


TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.IDLE, Event.ASK): Phase.ASKED,
    (Phase.IDLE, Event.EXCLUDE): Phase.OUT,
    (Phase.ASKED, Event.ANSWER): Phase.IDLE,
    (Phase.ASKED, Event.UPDATE): Phase.IN,
    (Phase.ASKED, Event.GIVE_UP): Phase.OUT,
    (Phase.IN, Event.ASK): Phase.ASKED_AGAIN,
    (Phase.IN, Event.LOSE): Phase.OUT,
    (Phase.ASKED_AGAIN, Event.ANSWER): Phase.IN,
    (Phase.ASKED_AGAIN, Event.GIVE_UP): Phase.IN,
}
"""The phase after an event. Every other event changes nothing, such as a second answer or an unexpected one."""


class TrainingRound:
    """A round of training under way; `open` creates it.

    Args:
        collection: collects and aggregates the cohort's updates.
    """

    def __init__(
        self,
        federation: Federation,
        state: FederationState,
        plan: RoundPlan,
        requests: Requests,
        collection: Collection,
    ) -> None:
        self.federation = federation
        self.state = state
        self.plan = plan
        self.requests = requests
        self.cohort = tuple(plan.assignment.trained)
        self._collection = collection
        self._started = time.monotonic()
        self._phases = dict.fromkeys(self.cohort, Phase.IDLE)
        own = plan.assignment.own
        self._records = {
            name: ClientRecord(name, tier=own[name], rank=tier) for name, tier in plan.assignment.trained.items()
        }
        self._exchange: Exchange | None = None
        self._aborted: str | None = None
        self._stale: dict[str, bytes] = {}
        for name, tier in plan.assignment.trained.items():
            if not tier:
                self._drop(name, Event.EXCLUDE, SAT_OUT)

    @classmethod
    def open(
        cls, federation: Federation, state: FederationState, population: Sequence[str], broadcast: Broadcast
    ) -> TrainingRound:
        """Plans the round after `state` and writes its requests.

        Args:
            population: names of the clients that can be reached now.
            broadcast: record of the versions that clients hold.
        """
        with span("selection"):
            plan = plan_round(federation, state, population)
        write = partial(train_request, federation, state, plan)
        requests = Requests(broadcast, state.held, write, plan.tiers)
        nothing = Downlink(FIRST, adapter_digest(state.held), (b"", b""))  # the downlink differs between clients
        with span("writing requests"):
            payloads = {name: requests.payload(name) for name in plan.tiers}
        inputs = Inputs(payloads, write(nothing, 0), state.stale_updates)
        frame = Frame(
            federation.layout, plan.factors, state.adapter, state.server, plan.slices, plan.terms, state.evidence
        )
        return cls(federation, state, plan, requests, federation.collector.begin(plan, frame, inputs))

    @property
    def number(self) -> int:
        """The round's number; rounds count from 1."""
        return self.plan.number

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the exchanges in order; clients that have not answered when the next one is fetched are late."""
        try:
            for exchange in self._collection.exchanges():
                self._exchange = exchange
                for name, parts in exchange.requests.items():
                    self._move(name, Event.ASK)
                    for purpose, part in zip(exchange.down, parts, strict=True):
                        self._count(name, self._records[name].traffic.sent(purpose, len(part)))
                yield exchange
                for name in sorted(self.cohort):
                    self.give_up(name, LATE)
        except (RoundAbortedError, JobError) as error:
            self._aborted = str(error)

    def take_in(self, name: str, payload: bytes) -> None:
        """Takes one client's answer to the exchange, or records why it is unusable; ignores a second answer."""
        exchange = self._exchange
        event = Event.UPDATE if exchange is not None and exchange.up == "update" else Event.ANSWER
        if exchange is None or not self._allows(name, event):
            return
        self._count(name, self._records[name].traffic.received(exchange.up, len(payload)))
        try:
            facts = self._collection.take(name, payload)
        except (PeerError, UpdateError) as error:
            self.give_up(name, str(error))
            return
        if exchange.carries_adapter:
            self.requests.broadcast.sent(name, self.state.held)
        self._move(name, event)
        if event is Event.UPDATE:
            self._settle(name, facts)

    def give_up(self, name: str, reason: str) -> None:
        """Records that a client does not answer; an update of it that is already in counts."""
        if self._exchange is None or not self._allows(name, Event.GIVE_UP):
            return
        self._collection.missed(name, reason)
        if self._exchange.carries_adapter:
            self.requests.broadcast.lost(name)
        self._drop(name, Event.GIVE_UP, reason)

    def take_stale(self, name: str, payload: bytes) -> None:
        """Keeps the answer of a client that was given up as late; the next round may use it."""
        if self._phases.get(name) is Phase.OUT and name not in self._stale:
            self._count(name, self._records[name].traffic.received("update", len(payload)))
            self._stale[name] = payload
            self.requests.broadcast.sent(name, self.state.held)

    def close(self) -> tuple[FederationState, RoundRecord]:
        """Returns the state after this round and its record.

        After a failed round only its number and the suspicion change.
        """
        for name in self.cohort:
            self.give_up(name, LATE)
        outcomes = self._collection.outcomes()
        lost = [outcome for outcome in outcomes if outcome.reason is not None] if self._aborted is None else []
        for outcome in lost:
            self._lose(outcome)
        for name in self.cohort:
            if self._allows(name, Event.EXCLUDE):
                self._drop(name, Event.EXCLUDE, ABORTED)
        clients = tuple(self._records[name] for name in self.cohort)
        with span("aggregation"):
            collected, aborted = self._collected(clients)
        suspicion = self.state.suspicion.after(outcomes)
        state = replace(self.state, round=self.number)
        notes = self.plan.assignment.notes + self.plan.grouping.notes
        notes += tuple(f"a group of {len(outcome.members)} clients has no sum: {outcome.reason}" for outcome in lost)
        if collected is not None:
            with span("server step"):
                state, changes = self._rebalanced(self._after(collected.aggregate))
            notes += collected.notes + changes + state.evidence.notes(self.state.evidence)
        record = RoundRecord(
            round=self.number,
            seconds=time.monotonic() - self._started,
            factors=self.plan.factors,
            learning_rate=self.plan.learning_rate,
            clients=clients,
            train_loss=collected.train_loss if collected else None,
            aborted=aborted,
            secure=collected.secure if collected else None,
            notes=notes + suspicion.notes(self.state.suspicion),
        )
        return replace(state, stale_updates=self._stale, suspicion=suspicion), record

    def _collected(self, clients: Sequence[ClientRecord]) -> tuple[Collected | None, str | None]:
        """Returns the survivors' outcome, or the reason why there is none."""
        survivors = [client for client in clients if client.dropped is None]
        least = self.federation.job.federation.minimum_clients
        if self._aborted is not None:
            return None, self._aborted
        if len(survivors) < least:
            return None, f"{len(survivors)} of {len(clients)} clients survived; at least {least} must"
        try:
            return self._collection.finish(survivors), None
        except (PeerError, RunError, UpdateError) as error:
            return None, str(error)

    def _after(self, aggregate: Aggregate) -> FederationState:
        """Returns the state after the server's step."""
        federation, layout, factors = self.federation, self.federation.layout, self.plan.factors
        update = aggregate.update
        for change in federation.postprocess:
            update = change(layout, factors, update)
        adapter = self.state.adapter.copy()
        server: State = {**self.state.server, **aggregate.state}
        start = layout.segment(factors).start
        for letter in factor_letters(factors):
            segment = layout.segment(letter)
            part = update[segment.start - start : segment.stop - start]
            step, server = federation.optimizer.step(letter, part, server)
            adapter[segment] += step
        clips = self.state.clips | aggregate.clips
        held = self.requests.broadcast.to_hold(adapter)
        return FederationState(
            self.number,
            adapter,
            held,
            clips,
            server,
            rebasing=self.state.rebasing,
            evidence=aggregate.evidence or self.state.evidence,
        )

    def _rebalanced(self, state: FederationState) -> tuple[FederationState, tuple[str, ...]]:
        """Returns the state in a balanced basis where rebalancing is due, and notes about it.

        The change of basis follows from the adapter that the round's devices held, so that they can compute it as well.
        """
        job, layout = self.federation.job, self.federation.layout
        every = job.federation.rebalance_every
        if not every or self.number % every:
            return state, ()
        pair = lora_layout(layout)
        changes = basis_changes(pair, self.state.held)
        adapter = changed(pair, changes, state.adapter)
        if np.array_equal(adapter, state.adapter):
            return state, ()
        server, lost = self.federation.optimizer.rebased(state.server, partial(follow, pair, changes))
        before = state.rebasing.round if state.rebasing else 0
        after = replace(
            state,
            adapter=adapter,
            held=self.requests.broadcast.to_hold(adapter),
            server=server,
            rebasing=Rebasing(self.number, adapter_digest(self.state.held), before),
        )
        return after, ("the adapter's basis was rebalanced", *([lost] if lost else []))

    def _allows(self, name: str, event: Event) -> bool:
        return name in self._phases and (self._phases[name], event) in TRANSITIONS

    def _move(self, name: str, event: Event) -> None:
        self._phases[name] = TRANSITIONS[self._phases[name], event]

    def _drop(self, name: str, event: Event, reason: str) -> None:
        self._move(name, event)
        if self._phases[name] is Phase.OUT:
            self._settle(name, dropped=reason)

    def _lose(self, outcome: GroupOutcome) -> None:
        """Drops the clients of a group that has no sum; trackers know already of those whose update was in."""
        reason = f"its group has no sum: {outcome.reason}"
        for name in outcome.members:
            if self._allows(name, Event.EXCLUDE):
                self._drop(name, Event.EXCLUDE, reason)
            elif self._allows(name, Event.LOSE):
                self._move(name, Event.LOSE)
                self._records[name] = replace(self._records[name], dropped=reason)

    def _count(self, name: str, traffic: Ledger) -> None:
        self._records[name] = replace(self._records[name], traffic=traffic)

    def _settle(self, name: str, facts: ClientFacts = NO_FACTS, dropped: str | None = None) -> None:
        self._records[name] = replace(
            self._records[name],
            answered=time.monotonic() - self._started,
            examples=facts.examples,
            tokens=facts.tokens,
            loss=facts.loss,
            seconds=facts.seconds,
            dropped=dropped,
        )
        for tracker in self.federation.trackers:
            tracker.client(self._records[name])
