"""Updates under secure aggregation: five exchanges with the cohort, and one sum at the end, or one for each group.

    exchange          to a client                              from a client
    query.open        the configuration and the request        its keys for this round
    query.share       all clients' keys                        its secrets' shares, encrypted for their holders
    train             the shares it holds for others           its masked update
    query.vote        the sharers and survivors                its signature over them
    query.unmask      a quorum of signatures                   shares that remove the masks from the sum

`fedtune.core.secagg` implements the protocol; this module connects it to a round of training.
docs/secure-aggregation.md states the threat model. An aborted round leaves the adapter as it was, and the next round
starts from the beginning. If a sum fails and nobody can be named, `cohorts/suspicion.py` finds out who it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.codec.masked import masked_segments, opened_sums
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.errors import PeerError, RoundAbortedError, RunError
from fedtune.core.job.secure_cohorts import FEWEST_MEANS, tier_minimum
from fedtune.core.job.settings import SecureAggregationSettings
from fedtune.core.ledger import Purpose
from fedtune.core.protocol.messages import OPEN, SHARE, TRAIN, UNMASK, VOTE, query, terms_digest
from fedtune.core.round_records import ClientRecord, SecureRecord
from fedtune.core.secagg import (
    Assumptions,
    Member,
    Roster,
    RoundMark,
    Segment,
    ServerSession,
    Stage,
    Subject,
    round_config,
)
from fedtune.core.secagg.client_checks import refuses_shares
from fedtune.core.secagg.graph import MIN_SURVIVORS
from fedtune.core.spans import span
from fedtune.strategies.aggregation import Aggregation, Aggregator, Frame, GroupSum
from fedtune.strategies.cohorts.suspicion import NOBODY, GroupOutcome
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
    """Collects masked updates, and gives the aggregator only their sums: SecureSum(Grouped(RingMean(...), ...), ...).

    Args:
        aggregator: takes the sum over each group.
        job: digest of the job's terms, its name in every device's log of the rounds it has served.
        settings: the job's.
    """

    aggregator: Aggregator[GroupSum]
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
    """The collection of a secure round; the server sees only one sum for each group, over its survivors.

    The groups go through the exchanges in step. One that has no sum leaves the others as they are.
    """

    def __init__(
        self, collector: SecureSum, plan: RoundPlan, aggregation: Aggregation[GroupSum], inputs: Inputs
    ) -> None:
        self._job, self._secure, self._settings = collector.job, collector.secure, collector.settings
        self._plan = plan
        self._aggregation = aggregation
        self._inputs = inputs
        self._groups: tuple[_Group, ...] = ()
        self._group_of: dict[str, _Group] = {}

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the five exchanges, as long as a group has enough clients left."""
        self._groups = self._open()
        self._group_of = {name: group for group in self._groups for name in group.members}
        while waiting := [group for group in self._groups if group.requests]:
            exchange = self._exchange(waiting)
            yield exchange
            with span(f"ending {exchange.message_type}"):
                for group in waiting:
                    group.advance()
            if all(group.failure is not None for group in self._groups):
                failures = dict.fromkeys(str(group.failure) for group in self._groups)
                raise RoundAbortedError("; ".join(failures))

    def take(self, name: str, payload: bytes) -> ClientFacts:
        """Passes a client's answer to the protocol, which hides the facts about it."""
        self._group_of[name].session.receive(name, payload)
        return ClientFacts()

    def missed(self, name: str, reason: str) -> None:
        """Takes note of a client that says it was sent bad shares: the failure is not its own."""
        self._group_of[name].missed(reason)

    def outcomes(self) -> tuple[GroupOutcome, ...]:
        """Returns what became of each group's sum."""
        return tuple(group.outcome for group in self._groups)

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        """Returns the aggregate of the groups' sums; the survivors are those of the protocol."""
        del survivors
        summed = [group for group in self._groups if group.failure is None]
        sizes = [len(group.outcome.summed) for group in summed]
        configs = [group.session.config for group in summed]
        record = SecureRecord(
            summed=sum(sizes),
            minimum=min(config.minimum for config in configs),
            threshold=min(config.threshold for config in configs),
            liars=tuple(liar for group in summed for liar in group.session.result.liars),
            groups=len(summed),
            smallest=min(sizes),
        )
        loss = _mean_loss([(group.loss, size) for group, size in zip(summed, sizes, strict=True)])
        return Collected(self._aggregation.finish(), loss, record, self._notes(len(summed)))

    def _notes(self, sums: int) -> tuple[str, ...]:
        if len(self._plan.grouping.groups) < FEWEST_MEANS or sums >= FEWEST_MEANS:
            return ()
        return (f"sums of only {sums} groups: of fewer than {FEWEST_MEANS} no rule can leave a hostile one out",)

    def _open(self) -> tuple[_Group, ...]:
        tiers, request = self._plan.uplink.tiers, self._inputs.common
        mark = RoundMark(request.round, self._secure.clock() // 1_000_000)
        digests = request.base.digest, request.adapter.digest
        subject = Subject(self._job, mark, *digests, terms_digest(request))
        segments = masked_segments(self._plan.terms, tiers)
        return tuple(self._group(subject, names, segments) for names in self._plan.grouping.groups)

    def _group(self, subject: Subject, names: Sequence[str], segments: Sequence[Segment]) -> _Group:
        settings, tiers = self._settings, self._plan.uplink.tiers
        cohort = [Member(name, tiers.index(self._plan.tiers[name]) if tiers else 0) for name in names]
        least = tier_minimum(settings, len(cohort)) if len(tiers) > 1 else MIN_SURVIVORS
        assumptions = Assumptions(settings.max_corrupt, settings.max_dropout, least)
        config = round_config(subject, cohort, segments, assumptions)
        return _Group(ServerSession(config, self._secure.identities), self._plan.terms, self._aggregation)

    def _exchange(self, groups: Sequence[_Group]) -> Exchange:
        (stage,) = {group.session.stage for group in groups}
        opens, closing = stage is Stage.ADVERTISE, self._plan.closing if stage is Stage.MASK else None
        messages = {name: message for group in groups for name, message in group.requests.items()}
        requests = {
            name: (message, self._inputs.requests[name]) if opens else (message,) for name, message in messages.items()
        }
        travel = _TRAVEL[stage]
        largest = max(group.session.reply_limit for group in groups)
        return Exchange(travel.message_type, requests, travel.down, travel.up, largest, opens, closing)


def _mean_loss(groups: Sequence[tuple[float | None, int]]) -> float | None:
    """Returns the mean over groups of these losses and sizes; to the bit the first one's if they are equal."""
    first = groups[0][0]
    if first is None:
        return None
    return first + sum(size * ((loss or 0.0) - first) for loss, size in groups) / sum(size for _, size in groups)


class _Group:
    """One group's way through the protocol, to a sum in the aggregation or to the reason why it has none.

    Attributes:
        requests: client -> the message that it is sent next; empty when the way is at its end.
        failure: why there is no sum, or None.
        loss: mean training loss of the clients in the sum; None where losses are not summed.
    """

    def __init__(
        self, session: ServerSession, terms: Sequence[FactorTerms], aggregation: Aggregation[GroupSum]
    ) -> None:
        self.session = session
        self.members = tuple(member.client for member in session.config.cohort)
        self.requests: Mapping[str, bytes] = session.open()
        self.failure: str | None = None
        self.loss: float | None = None
        self._terms, self._aggregation = terms, aggregation
        self._sharers: frozenset[str] = NOBODY
        self._refused = False  # whether a client has refused the shares that another dealt
        self._suspects: frozenset[str] = NOBODY

    @property
    def outcome(self) -> GroupOutcome:
        """The outcome so far."""
        if self.failure is not None:
            return GroupOutcome(self.members, reason=self.failure, suspects=self._suspects)
        done = self.session.stage is Stage.DONE
        return GroupOutcome(self.members, frozenset(self.session.result.survivors) if done else NOBODY)

    def missed(self, reason: str) -> None:
        """Takes note of the reason why a client gives no usable answer."""
        self._refused = self._refused or refuses_shares(reason)

    def advance(self) -> None:
        """Ends the exchange under way; after the last one, adds the sum to the aggregation.

        Too few answers are the fault of those who do not answer, unless they refuse the shares that another dealt. Of
        shares that do not fit together, and of a sum out of range, anyone who dealt shares may be the cause.
        """
        try:
            self.requests = self.session.advance()
            if self.session.stage is Stage.MASK:
                self._sharers = frozenset(self.requests)
            if self.session.stage is Stage.DONE:
                self._add()
        except (PeerError, RunError) as error:
            named = type(error) is RoundAbortedError and not self._refused
            self._suspects = NOBODY if named else self._sharers
            self.requests, self.failure = {}, str(error)

    def _add(self) -> None:
        result = self.session.result
        totals, self.loss = opened_sums(result.sums, result.contributors, self._terms)
        self._aggregation.add(GroupSum(tuple(result.survivors), dict(zip(self._terms, totals, strict=True))))
