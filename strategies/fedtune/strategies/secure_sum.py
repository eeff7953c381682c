"""Updates under secure aggregation: five exchanges with the cohort, and one sum at the end.

    exchange          to a client                              from a client
    query.open        the configuration and the request        its keys for this round
    query.share       all clients' keys                        its secrets' shares, encrypted for their holders
    train             the shares it holds for others           its masked update
    query.vote        the sharers and survivors                its signature over them
    query.unmask      a quorum of signatures                   shares that remove the masks from the sum

`fedtune.core.secagg` implements the protocol; this module connects it to a round of training.
docs/secure-aggregation.md states the threat model. An aborted round leaves the adapter as it was, and the next round
starts from the beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.codec.masked import masked_segments, opened_sums
from fedtune.core.job.settings import SecureAggregationSettings
from fedtune.core.ledger import Purpose
from fedtune.core.protocol.messages import OPEN, SHARE, TRAIN, UNMASK, VOTE, query, terms_digest
from fedtune.core.round_records import ClientRecord, SecureRecord
from fedtune.core.secagg import Assumptions, Member, Roster, RoundMark, ServerSession, Stage, Subject, round_config
from fedtune.core.secagg.graph import MIN_SURVIVORS
from fedtune.strategies.aggregation.aggregator import Aggregation, Aggregator, Frame
from fedtune.strategies.aggregation.payload_sums import Totals
from fedtune.strategies.cohorts.tier_assignment import tier_minimum
from fedtune.strategies.collection import ClientFacts, Collected, Exchange, Inputs
from fedtune.strategies.requests import RoundPlan


@dataclass(frozen=True)
class SecureAggregation:
    """The server's inputs to secure rounds beside the job.

    Args:
        identities: public identity keys of the enrolled devices; the devices pin the same ones.
        clock: nanoseconds since 1970; each attempt at a round must be later than the one before, across restarts.
    """

    identities: Roster
    clock: Callable[[], int] = time.time_ns


@dataclass(frozen=True)
class SecureSum:
    """Collects masked updates, and gives the aggregator only their sum: SecureSum(RingMean(...), ...).

    Args:
        aggregator: takes the sum, once a round.
        job: digest of the job's terms, its name in every device's log of the rounds it has served.
        settings: the job's.
    """

    aggregator: Aggregator[Totals]
    job: str
    secure: SecureAggregation
    settings: SecureAggregationSettings
    single_exchange: ClassVar[bool] = False

    def admits(self, client: str) -> bool:
        """Admits the clients whose identity keys the others pin."""
        return client in self.secure.identities.keys

    def begin(self, plan: RoundPlan, frame: Frame, inputs: Inputs) -> SecureCollection:
        """Begins a collection with five exchanges."""
        return SecureCollection(self, plan, self.aggregator.begin(frame), inputs)


@dataclass(frozen=True)
class _Travel:
    """The wire form of one stage of the protocol."""

    message_type: str
    down: tuple[Purpose, ...]
    up: Purpose


_TRAVEL: Mapping[Stage, _Travel] = {
    Stage.ADVERTISE: _Travel(query(OPEN), ("keys", "adapter"), "keys"),
    Stage.SHARE: _Travel(query(SHARE), ("shares",), "shares"),
    Stage.MASK: _Travel(TRAIN, ("shares",), "update"),
    Stage.VOTE: _Travel(query(VOTE), ("votes",), "votes"),
    Stage.UNMASK: _Travel(query(UNMASK), ("unmasking",), "unmasking"),
}


class SecureCollection:
    """The collection of a secure round; the server sees only the sum over the survivors."""

    def __init__(self, collector: SecureSum, plan: RoundPlan, aggregation: Aggregation[Totals], inputs: Inputs) -> None:
        self._job, self._secure, self._settings = collector.job, collector.secure, collector.settings
        self._plan = plan
        self._aggregation = aggregation
        self._inputs = inputs
        self._session: ServerSession | None = None

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the five exchanges, as long as enough clients are left."""
        session = self._session = self._open()
        requests = session.open()
        while requests:
            yield self._exchange(session, requests)
            requests = session.advance()

    def take(self, name: str, payload: bytes) -> ClientFacts:
        """Passes a client's answer to the protocol, which hides the facts about it."""
        assert self._session is not None, "set before the first exchange"
        self._session.receive(name, payload)
        return ClientFacts()

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        """Adds the opened sum to the aggregation; the survivors are those of the protocol."""
        del survivors
        assert self._session is not None, "set before the first exchange"
        result, config = self._session.result, self._session.config
        totals, loss = opened_sums(result.sums, result.contributors, self._plan.terms)
        self._aggregation.add(dict(zip(self._plan.terms, totals, strict=True)))
        record = SecureRecord(len(result.survivors), config.minimum, config.threshold, result.liars)
        return Collected(self._aggregation.finish(), loss, secure=record)

    def _open(self) -> ServerSession:
        settings, tiers, request = self._settings, self._plan.uplink.tiers, self._inputs.common
        cohort = [Member(name, tiers.index(self._plan.tiers[name]) if tiers else 0) for name in self._inputs.requests]
        least = tier_minimum(settings, len(cohort)) if len(tiers) > 1 else MIN_SURVIVORS
        mark = RoundMark(request.round, self._secure.clock() // 1_000_000)
        digests = request.base.digest, request.adapter.digest
        config = round_config(
            Subject(self._job, mark, *digests, terms_digest(request)),
            cohort,
            masked_segments(self._plan.terms, tiers),
            Assumptions(settings.max_corrupt, settings.max_dropout, least),
        )
        return ServerSession(config, self._secure.identities)

    def _exchange(self, session: ServerSession, messages: Mapping[str, bytes]) -> Exchange:
        stage = session.stage
        opens, closing = stage is Stage.ADVERTISE, self._plan.closing if stage is Stage.MASK else None
        requests = {
            name: (message, self._inputs.requests[name]) if opens else (message,) for name, message in messages.items()
        }
        travel = _TRAVEL[stage]
        return Exchange(travel.message_type, requests, travel.down, travel.up, opens, closing)
