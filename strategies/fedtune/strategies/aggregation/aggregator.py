"""The interface of aggregation: it begins with a round, takes updates as they arrive, and returns their aggregate.

    aggregation = aggregator.begin(frame)
    for update in arriving:                     # in any order
        aggregation.add(update)                 # raises UpdateError, and is unchanged, where it cannot be added
    aggregation.merge(elsewhere)                # another part of the same round, aggregated by another process
    aggregate = aggregation.finish()
    adapter[layout.segment(frame.factors)] += aggregate.update
    state = aggregate.state                     # for the next round's frame

Aggregators compose by nesting, and read from the outside in as an update passes through them:

    Decoded(Clipped(Mean(method), norm=1.0), form)      # payloads are decoded, updates clipped, and averaged
    Unpacked(RingMean(method))                          # payloads are added as words of a ring, and decoded once

They hold no state between rounds: the state that a round leaves is returned and passed to the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.adapter.tiers import RankSlice
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.job.methods import Method
from fedtune.strategies.aggregation.evidence import NO_EVIDENCE, Evidence

State = Mapping[str, Vector]
NOTHING: State = {}
Clips = dict[str, float]


@dataclass(frozen=True)
class Frame:
    """The inputs of one round's aggregation beside the updates.

    Args:
        layout: the adapter's.
        factors: the factors that the round trains.
        adapter: the server's own adapter, float32, (layout.size,); methods that are not linear in the update need it.
        state: state that the last round's aggregate left.
        slices: slices of the rank indices, where clients train different ranks; none where all have the same.
        terms: the codec's terms for every factor or slice of it, in the order in which payloads travel.
        evidence: what earlier rounds tell against clients.
    """

    layout: AdapterLayout
    factors: Factors
    adapter: Vector
    state: State = field(default_factory=lambda: NOTHING)
    slices: Sequence[RankSlice] = ()
    terms: Sequence[FactorTerms] = ()
    evidence: Evidence = NO_EVIDENCE

    @property
    def size(self) -> int:
        """The number of values in an update: the length of the segment of the round's factors."""
        segment = self.layout.segment(self.factors)
        return int(segment.stop - segment.start)


@dataclass(frozen=True, eq=False)
class Update:
    """One client's update, decoded, or the mean of a group's.

    Args:
        values: trained minus received over the segment of the round's factors, float32, (frame.size,); zero where the
            client trained nothing.
        weight: weight in the mean; at least 1.
        tier: number of rank indices that the client trained; 0 in a round without slices.
        clients: the clients of a group.
    """

    values: Vector
    weight: int
    tier: int = 0
    clients: tuple[str, ...] = ()


@dataclass(frozen=True)
class Payloads:
    """One client's update as it travelled.

    Args:
        parts: one payload for each of the terms of the client's tier.
        weight, tier: as in `Update`; a ring has no weights.
    """

    parts: Sequence[bytes]
    weight: int
    tier: int = 0


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The outcome of an aggregation.

    Args:
        update: change to add to the segment of the round's factors, float32; zeros without updates.
        state: state for the next round.
        clips: clips of a ring for the next round: factor -> norm to which updates are clipped.
        evidence: what this round and those before tell against clients; None where it was not tested.
    """

    update: Vector
    state: State = field(default_factory=lambda: NOTHING)
    clips: Clips = field(default_factory=dict)
    evidence: Evidence | None = None


Added = TypeVar("Added", contravariant=True)


class Aggregation(Protocol[Added]):
    """One round's aggregation, under way: of updates, in the outermost of `Payloads`, in a ring of sums."""

    def add(self, update: Added, /) -> None:
        """Adds one client's update, or a sum of several.

        Raises:
            PeerError, UpdateError: it cannot be added; the aggregation is unchanged.
        """

    def merge(self, other: Self) -> None:
        """Adds everything that another aggregation of the same frame has added; the result equals adding each update.

        Raises:
            UpdateError: both together exceed the limits; the aggregation is unchanged.
        """

    def finish(self) -> Aggregate:
        """Returns the aggregate of all added updates.

        Raises:
            PeerError, RunError: the total cannot be one of that many updates.
        """


class Aggregator(Protocol[Added]):
    """A way to combine client updates."""

    @property
    def method(self) -> Method:
        """The declaration of its needs and effects; an aggregator around another passes the inner one's on."""

    def begin(self, frame: Frame) -> Aggregation[Added]:
        """Returns an empty aggregation for a round."""
