"""Updates under secure aggregation: five exchanges with the cohort, and one sum at the end.

    exchange          to a client                              from a client
    query.open        the configuration; what to train         its keys for this round
    query.share       everybody's keys                         its secrets' shares, sealed for their holders
    train             the shares it holds for others           its masked update
    query.vote        who is in the sum                        its signature over that
    query.unmask      enough signatures                        shares that take the masks off the sum

The protocol is `fedtune.core.secagg`'s; here it meets a round of training. docs/secure-aggregation.md states the threat
model. A round that must abort leaves the adapter as it was, and the next round starts afresh.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedtune.core.codec.masked import masked_segments, opened_sums
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.job.settings import Job
from fedtune.core.ledger import Purpose
from fedtune.core.protocol.actions import OPEN, SHARE, TRAIN, UNMASK, VOTE, query
from fedtune.core.protocol.payloads import Base, TrainRequest, terms_digest
from fedtune.core.round_records import ClientRecord, SecureRecord
from fedtune.core.secagg import Member, Roster, RoundMark, ServerSession, Stage, round_config
from fedtune.core.secagg.graph import MIN_SURVIVORS
from fedtune.strategies.aggregation.reduction import finish_ring
from fedtune.strategies.cohorts.tier_assignment import tier_minimum
from fedtune.strategies.collection import Asked, Collected
from fedtune.strategies.exchange import ClientFacts, Exchange


@dataclass(frozen=True)
class SecureAggregation:
    """What a server needs for secure rounds.

    Args:
        run: names the run, on the server and in every device's memory of the rounds it has served.
        identities: the public identity keys of the enrolled devices; the devices pin the same.
        clock: nanoseconds since 1970; an attempt at a round must come later than the one before, across restarts.
    """

    run: str
    identities: Roster
    clock: Callable[[], int] = time.time_ns


@dataclass(frozen=True)
class _Step:
    """How one stage of the protocol travels."""

    message_type: str
    down: tuple[Purpose, ...]
    up: Purpose


_STEPS: Mapping[Stage, _Step] = {
    Stage.ADVERTISE: _Step(query(OPEN), ("keys", "adapter"), "keys"),
    Stage.SHARE: _Step(query(SHARE), ("shares",), "shares"),
    Stage.MASK: _Step(TRAIN, ("shares",), "update"),
    Stage.VOTE: _Step(query(VOTE), ("votes",), "votes"),
    Stage.UNMASK: _Step(query(UNMASK), ("unmasking",), "unmasking"),
}


class SecureCollection:
    """Five exchanges; the server sees the sum over the survivors.

    Args:
        request: what everybody is asked; the tier and the way the adapter travels differ between clients.
        terms: of all slices.
        asked: by client.
    """

    def __init__(
        self,
        secure: SecureAggregation,
        job: Job,
        base: Base,
        request: TrainRequest,
        terms: Sequence[FactorTerms],
        asked: Mapping[str, Asked],
    ) -> None:
        self._secure = secure
        self._job = job
        self._base = base
        self._request = request
        self._terms = terms
        self._asked = asked
        self._session: ServerSession | None = None

    def exchanges(self) -> Iterator[Exchange]:
        session = self._session = self._open()
        requests = session.open()
        while requests:
            yield self._exchange(session, requests)
            requests = session.advance()

    def take(self, name: str, payload: bytes) -> ClientFacts | None:
        assert self._session is not None, "set before the first exchange"
        self._session.receive(name, payload)
        return ClientFacts() if self._session.stage is Stage.MASK else None

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        del survivors  # the protocol knows better who is in the sum
        assert self._session is not None, "set before the first exchange"
        result, config = self._session.result, self._session.config
        summed = len(result.survivors)
        totals, loss = opened_sums(result.sums, result.contributors, self._terms)
        aggregate, clips = finish_ring(totals, self._terms)
        record = SecureRecord(summed, config.minimum, config.threshold, result.liars)
        return Collected(aggregate, clips, loss, secure=record)

    def _open(self) -> ServerSession:
        settings, tiers = self._job.secure_aggregation, self._request.uplink.tiers
        cohort = [Member(name, tiers.index(asked.tier) if tiers else 0) for name, asked in self._asked.items()]
        config = round_config(
            job=self._secure.run,
            mark=RoundMark(self._request.round, self._secure.clock() // 1_000_000),
            base_digest=self._base.digest,
            adapter_digest=self._request.adapter.digest,
            cohort=cohort,
            segments=masked_segments(self._terms, tiers),
            max_corrupt=settings.max_corrupt,
            max_dropout=settings.max_dropout,
            context=terms_digest(self._request),
            min_tier_survivors=tier_minimum(self._job, len(cohort)) if len(tiers) > 1 else MIN_SURVIVORS,
        )
        return ServerSession(config, self._secure.identities)

    def _exchange(self, session: ServerSession, messages: Mapping[str, bytes]) -> Exchange:
        stage = session.stage
        opens = stage is Stage.ADVERTISE
        requests = {
            name: (message, self._asked[name].request) if opens else (message,) for name, message in messages.items()
        }
        step = _STEPS[stage]
        return Exchange(step.message_type, requests, step.down, step.up, carries_adapter=opens)
