"""How a round gets one aggregate out of its cohort: which exchanges it takes, and what they sum to.

`ClearCollection` asks once and reads every update, or adds it in a ring; `fedtune.strategies.secure_collection` asks
five times and sees only the sum. A round does not care which one it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec.downlink import max_body_size
from fedtune.core.codec.uplink import FactorTerms, uplink_weight
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.protocol.actions import TRAIN
from fedtune.core.protocol.payloads import HEADER_BYTES, TrainReply, Uplink, decode
from fedtune.core.round_records import ClientRecord, SecureRecord
from fedtune.strategies.aggregation import NOTHING, State
from fedtune.strategies.aggregation.reduction import Clips, Reduction
from fedtune.strategies.cohorts.virtual_clock import staleness_weight
from fedtune.strategies.exchange import ClientFacts, Exchange

NO_STALE_UPDATES: Mapping[str, bytes] = {}


@dataclass(frozen=True)
class Collected:
    """What a round gives.

    Args:
        aggregate: over the segment of the round's factors, float32.
        clips: for the next round that trains each factor; empty where nothing is clipped.
        train_loss: mean over the survivors, weighted by target tokens where they are known.
        state: what the aggregator leaves to the next round.
        secure: what the server saw, under secure aggregation.
        notes: what became of late updates, one sentence each.
    """

    aggregate: Vector
    clips: Clips
    train_loss: float | None
    state: State = field(default_factory=lambda: NOTHING)
    secure: SecureRecord | None = None
    notes: tuple[str, ...] = ()


class Collection(Protocol):
    """The collection of one round's updates, under way."""

    def exchanges(self) -> Iterator[Exchange]:
        """What to ask, one exchange after the other; the next one may depend on the answers to the last.

        Raises:
            RoundAbortedError, JobError: the round cannot go on.
        """

    def take(self, name: str, payload: bytes) -> ClientFacts | None:
        """Takes a client's answer: its facts if its update is in now, None if there is more to come.

        Raises:
            PeerError, UpdateError: the answer cannot be used; nothing has changed.
        """

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        """What the survivors' updates come to.

        Raises:
            PeerError, RunError: to nothing that can be used.
        """


@dataclass(frozen=True)
class Asked:
    """What a client is asked.

    Args:
        request: encoded.
        tier: how many rank indices it is asked to train; 0 where all train everything.
    """

    request: bytes
    tier: int = 0


class ClearCollection:
    """One exchange; every update goes to a reduction as it arrives.

    Args:
        number: of the round.
        asked: by client; what it sends must be of the tier it was asked for.
        stale: client -> its answer to the round before. It weighs less than one that is in time, and nothing where
            its client has answered this round, or where this round's slices are not that one's.
    """

    def __init__(
        self,
        number: int,
        uplink: Uplink,
        reduction: Reduction,
        terms: Sequence[FactorTerms],
        asked: Mapping[str, Asked],
        stale_updates: Mapping[str, bytes] = NO_STALE_UPDATES,
    ) -> None:
        self._number = number
        self._uplink = uplink
        self._reduction = reduction
        self._limit = sum(max_body_size(each.count) for each in terms) + HEADER_BYTES
        self._asked = asked
        self._stale = stale_updates

    def exchanges(self) -> Iterator[Exchange]:
        requests = {name: (asked.request,) for name, asked in self._asked.items()}
        yield Exchange(TRAIN, requests, ("adapter",), "update", carries_adapter=True)

    def take(self, name: str, payload: bytes) -> ClientFacts:
        reply = self._read(payload, self._number)
        weight = uplink_weight(self._uplink, reply.examples, reply.tokens)
        self._reduction.take(reply.update, weight, self._asked[name].tier)
        return ClientFacts(reply.examples, reply.tokens, reply.loss, reply.seconds)

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        present = {client.id for client in survivors}
        notes = [self._take_stale(name) for name in sorted(self._stale) if name not in present]
        aggregate, clips = self._reduction.finish()
        return Collected(aggregate, clips, _mean_loss(survivors), self._reduction.state, notes=tuple(notes))

    def _take_stale(self, name: str) -> str:
        if self._uplink.tiers:
            return f"the late update of {name} was dropped: rounds of mixed ranks have slices of their own"
        try:
            reply = self._read(self._stale[name], self._number - 1)
            weight = uplink_weight(self._uplink, reply.examples, reply.tokens) * staleness_weight(1)
            self._reduction.take(reply.update, max(1, round(weight)))
        except (PeerError, UpdateError) as error:
            return f"the late update of {name} was dropped: {error}"
        return f"the late update of {name} was taken at {staleness_weight(1):.2f} of its weight"

    def _read(self, payload: bytes, number: int) -> TrainReply:
        reply = decode(payload, TrainReply, self._limit)
        if reply.round != number:
            raise PeerError(f"an update for round {reply.round}; expected round {number}")
        if reply.examples < 1:
            raise PeerError("an update that was trained on no examples")
        return reply


def _mean_loss(survivors: Sequence[ClientRecord]) -> float | None:
    tokens = sum(client.tokens for client in survivors)
    if not tokens:
        return None
    return sum((client.loss or 0.0) * client.tokens for client in survivors) / tokens
