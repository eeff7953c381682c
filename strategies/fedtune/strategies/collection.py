"""The collection of a round's updates: the exchanges with the cohort, and the aggregate that they give.

    collection = collector.begin(plan, frame, inputs)
    for exchange in collection.exchanges():
        for name, parts in exchange.requests.items(): send parts to name as a message of exchange.message_type
        facts = collection.take(name, payload)      # for each answer, in any order
    collected = collection.finish(survivors)

`InTheClear` has one exchange and sees every payload; `fedtune.strategies.secure_sum.SecureSum` has five and sees only
the sum. A round works the same with either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fedtune.core.codec.downlink import max_body_size
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.job.settings import FederationSettings
from fedtune.core.ledger import Purpose
from fedtune.core.protocol.messages import HEADER_BYTES, TRAIN, TrainReply, TrainRequest, decode
from fedtune.core.round_records import ClientRecord, SecureRecord
from fedtune.core.round_timing import staleness_weight
from fedtune.strategies.aggregation.aggregator import Aggregate, Aggregation, Aggregator, Frame, Payloads
from fedtune.strategies.cohorts.suspicion import GroupOutcome
from fedtune.strategies.schedule import Closing

if TYPE_CHECKING:
    from fedtune.strategies.requests import RoundPlan

NO_ANSWERS: Mapping[str, bytes] = {}


@dataclass(frozen=True)
class Exchange:
    """One exchange of a round: a message to each of some clients.

    Args:
        message_type: Flower's message type, which selects the client's handler.
        requests: client -> the parts of its message; clients with equal requests share the same bytes.
        down: the ledger's purpose of each part.
        up: the ledger's purpose of an answer.
        reply_bytes: largest number of bytes that an honest answer can have.
        carries_adapter: whether a client that answers holds the adapter from then on.
        closing: the condition that ends the exchange early; None to wait for all clients up to the job's deadline.
    """

    message_type: str
    requests: Mapping[str, tuple[bytes, ...]]
    down: tuple[Purpose, ...]
    up: Purpose
    reply_bytes: int
    carries_adapter: bool = False
    closing: Closing | None = None


@dataclass(frozen=True)
class ClientFacts:
    """The facts about a client that its answer states beside the update; under secure aggregation there are none.

    Args:
        seconds: duration of local training, as the client reports it.
    """

    examples: int = 0
    tokens: int = 0
    loss: float | None = None
    seconds: float = 0.0


NO_FACTS = ClientFacts()


@dataclass(frozen=True, eq=False)
class Collected:
    """The outcome of a collection.

    Args:
        train_loss: mean over the survivors, weighted by target tokens where they are known.
        secure: record of the secure round, under secure aggregation.
        notes: one sentence about each stale update.
    """

    aggregate: Aggregate
    train_loss: float | None
    secure: SecureRecord | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """The messages that a collection starts from.

    Args:
        requests: client that is asked to train -> its encoded request.
        common: the part of the request that is equal for all clients: all but the tier and the downlink.
        stale: client -> its answer to the round before.
    """

    requests: Mapping[str, bytes]
    common: TrainRequest
    stale: Mapping[str, bytes] = field(default_factory=lambda: NO_ANSWERS)


class Collection(Protocol):
    """The collection of one round's updates, under way."""

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the exchanges in order; each may depend on the answers to the one before.

        Raises:
            RoundAbortedError, JobError: the round cannot go on.
        """

    def take(self, name: str, payload: bytes) -> ClientFacts:
        """Takes a client's answer, and returns the facts that it states.

        Raises:
            PeerError, UpdateError: the answer cannot be used; nothing has changed.
        """

    def missed(self, name: str, reason: str) -> None:
        """Takes note that a client gives no usable answer to an exchange, and why."""

    def outcomes(self) -> Sequence[GroupOutcome]:
        """Returns what became of each group's sum, once the exchanges are over; none in the clear."""

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        """Returns the outcome of the survivors' updates.

        Raises:
            PeerError, RunError: no usable aggregate results.
        """


class Collector(Protocol):
    """A way to collect a round's updates around an aggregator of payloads."""

    @property
    def aggregator(self) -> Aggregator[Any]:
        """The aggregator that receives the payloads, or their sum."""

    @property
    def single_exchange(self) -> bool:
        """True if a round consists of a single exchange."""

    def admits(self, client: str) -> bool:
        """Returns whether a client can be asked to train."""

    def begin(self, plan: RoundPlan, frame: Frame, inputs: Inputs) -> Collection:
        """Begins the collection of one round."""


@dataclass(frozen=True)
class InTheClear:
    """Collects payloads in the clear: each goes to the aggregation as it arrives."""

    aggregator: Aggregator[Payloads]
    settings: FederationSettings
    single_exchange: ClassVar[bool] = True

    def admits(self, client: str) -> bool:
        """Admits every client."""
        del client
        return True

    def begin(self, plan: RoundPlan, frame: Frame, inputs: Inputs) -> ClearCollection:
        """Begins a collection with one exchange."""
        return ClearCollection(self.settings, plan, self.aggregator.begin(frame), inputs)


class ClearCollection:
    """The collection of a round in the clear.

    A stale update has less weight than one that arrives in time. It is dropped where its client has answered this
    round, or where the slices of this round differ from those of its own.
    """

    def __init__(
        self, settings: FederationSettings, plan: RoundPlan, aggregation: Aggregation[Payloads], inputs: Inputs
    ) -> None:
        self._settings, self._plan = settings, plan
        self._aggregation = aggregation
        self._inputs = inputs
        self._limit = sum(max_body_size(each.count) for each in plan.terms) + HEADER_BYTES

    def exchanges(self) -> Iterator[Exchange]:
        """Yields the only exchange."""
        requests = {name: (request,) for name, request in self._inputs.requests.items()}
        yield Exchange(
            TRAIN, requests, ("adapter",), "update", self._limit, carries_adapter=True, closing=self._plan.closing
        )

    def take(self, name: str, payload: bytes) -> ClientFacts:
        """Adds a client's update."""
        reply = self._read(payload, self._plan.number)
        weight = client_weight(self._settings, reply.examples, reply.tokens)
        self._aggregation.add(Payloads(reply.update, weight, self._plan.tiers[name]))
        return ClientFacts(reply.examples, reply.tokens, reply.loss, reply.seconds)

    def missed(self, name: str, reason: str) -> None:
        """Does nothing: no other client's update needs this one's."""

    def outcomes(self) -> tuple[GroupOutcome, ...]:
        """Returns none: there are no groups."""
        return ()

    def finish(self, survivors: Sequence[ClientRecord]) -> Collected:
        """Adds the stale updates, and finishes the aggregation."""
        present = {client.id for client in survivors}
        notes = [self._take_stale(name) for name in sorted(self._inputs.stale) if name not in present]
        return Collected(self._aggregation.finish(), _mean_loss(survivors), notes=tuple(notes))

    def _take_stale(self, name: str) -> str:
        if self._plan.slices:
            return f"the late update of {name} was dropped: rounds of mixed ranks have slices of their own"
        try:
            reply = self._read(self._inputs.stale[name], self._plan.number - 1)
            weight = client_weight(self._settings, reply.examples, reply.tokens) * staleness_weight(1)
            self._aggregation.add(Payloads(reply.update, max(1, round(weight))))
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


def client_weight(settings: FederationSettings, examples: int, tokens: int) -> int:
    """Returns a client's weight, 1 to `weight_cap`: the cap for all alike, its examples, or its target tokens."""
    claimed = {"uniform": settings.weight_cap, "examples": examples, "tokens": tokens}[settings.weight]
    return max(1, min(claimed, settings.weight_cap))


def _mean_loss(survivors: Sequence[ClientRecord]) -> float | None:
    tokens = sum(client.tokens for client in survivors)
    if not tokens:
        return None
    return sum((client.loss or 0.0) * client.tokens for client in survivors) / tokens
