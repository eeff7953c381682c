"""What an aggregator is: it says what a round trains, and reduces the round's updates to one aggregate as they arrive.

    factors = aggregator.factors(round_number)          # goes into every client's request
    accumulator = aggregator.accumulator(layout, factors)
    for update, weight in arriving:                     # any order, O(adapter) memory whatever the cohort
        accumulator.add(update, weight)
    segment = layout.segment(factors)
    adapter[segment] += accumulator.finish()

An update is trained minus received over the segment of the round's factors. Aggregators hold no state between rounds.
"""

from __future__ import annotations

from typing import Protocol

from fedtune.core.adapter import AdapterLayout, Factors, Vector


class Accumulator(Protocol):
    """The reduction of one round, under way."""

    def add(self, update: Vector, weight: int) -> None:
        """Takes one client's update in; raises UpdateError and stays unchanged where it cannot be."""

    def finish(self) -> Vector:
        """The aggregate over the round's segment, float32."""


class Aggregator(Protocol):
    """A way to combine client updates."""

    def factors(self, round_number: int) -> Factors:
        """What clients train and send in this round; rounds count from 1."""

    def accumulator(self, layout: AdapterLayout, factors: Factors) -> Accumulator:
        """An empty reduction for a round that trains these factors."""
