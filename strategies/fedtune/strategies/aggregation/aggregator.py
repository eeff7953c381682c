"""What an aggregator is: it says what a round trains, and reduces the round's updates to one aggregate as they arrive.

    factors = aggregator.factors(round_number)          # goes into every client's request
    accumulator = aggregator.accumulator(layout, factors, adapter, state, slices)
    for update, weight, tier in arriving:               # any order
        accumulator.add(update, weight, tier)
    segment = layout.segment(factors)
    adapter[segment] += accumulator.finish()
    state = accumulator.state                           # of aggregators that keep something; empty for the others

An update is trained minus received over the segment of the round's factors, zero where its client trained nothing.
Aggregators hold no state between rounds: what one round leaves to the next is handed out and handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.adapter.tiers import RankSlice

State = Mapping[str, Vector]
NOTHING: State = {}


class Accumulator(Protocol):
    """The reduction of one round, under way."""

    def add(self, update: Vector, weight: int, tier: int = 0) -> None:
        """Takes one client's update in; raises UpdateError and stays unchanged where it cannot be.

        Args:
            tier: how many rank indices the client trained; 0 in a round without slices.
        """

    def finish(self) -> Vector:
        """The aggregate over the round's segment, float32; zeros where nothing was added."""

    @property
    def state(self) -> State:
        """What the next round's accumulator is given; read after `finish`."""


class Aggregator(Protocol):
    """A way to combine client updates."""

    def factors(self, round_number: int) -> Factors:
        """What clients train and send in this round; rounds count from 1."""

    def accumulator(
        self,
        layout: AdapterLayout,
        factors: Factors,
        adapter: Vector | None = None,
        state: State = NOTHING,
        slices: Sequence[RankSlice] = (),
    ) -> Accumulator:
        """An empty reduction for a round that trains these factors.

        Args:
            adapter: the server's, float32, (layout.size,); reductions that are not linear in the update need it.
            state: what the last round's accumulator left.
            slices: of the rank indices, where clients train different ranks; none where all train everything.
        """
