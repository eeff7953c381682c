"""From arriving payloads to one aggregate, streaming: decoded one by one, or added in a ring and decoded once.

Both have the same calls, so that a round does not care which one it has:

    reduction.take(payloads, weight)          # refuses with an error and stays unchanged where it cannot
    aggregate, clips = reduction.finish()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedtune.core.adapter import Vector
from fedtune.core.codec import ClipRange, RingUpdate, next_weight_cap
from fedtune.core.uplink import FactorTerms, add_ring, decode_factor, ring_mean, ring_zero
from fedtune.strategies.aggregators import NOTHING, Accumulator, State

Clips = dict[str, float]
WEIGHT = "weight"  # the place of the weight cap among a ring's clips


class Reduction(Protocol):
    """The reduction of one round, under way."""

    def take(self, payloads: Sequence[bytes], weight: int) -> None:
        """Adds one client's payloads, one a trained factor.

        Raises:
            PeerError, UpdateError: they cannot be added; nothing was.
        """

    def finish(self) -> tuple[Vector, Clips]:
        """The aggregate over the round's segment, float32, and a ring's clips for the next round: of each trained
        factor, and of weights."""

    @property
    def state(self) -> State:
        """What the aggregator leaves to the next round; read after `finish`."""


class ClearReduction:
    """Decodes every update and hands it to an accumulator."""

    def __init__(self, accumulator: Accumulator, terms: Sequence[FactorTerms]) -> None:
        self._accumulator = accumulator
        self._terms = terms

    def take(self, payloads: Sequence[bytes], weight: int) -> None:
        parts = [decode_factor(data, terms) for data, terms in zip(payloads, self._terms, strict=True)]
        self._accumulator.add(np.concatenate(parts), weight)

    def finish(self) -> tuple[Vector, Clips]:
        return self._accumulator.finish(), {}

    @property
    def state(self) -> State:
        return self._accumulator.state


class RingReduction:
    """Adds words in a ring; no single update is decoded. The weights travel inside."""

    state: State = NOTHING

    def __init__(self, terms: Sequence[FactorTerms]) -> None:
        self._terms = terms
        self._totals = [ring_zero(each) for each in terms]
        self._survivors = 0

    def take(self, payloads: Sequence[bytes], weight: int) -> None:
        del weight
        parts = zip(self._totals, payloads, self._terms, strict=True)
        self._totals = [add_ring(total, data, terms) for total, data, terms in parts]
        self._survivors += 1

    def finish(self) -> tuple[Vector, Clips]:
        if not self._survivors:
            return np.zeros(sum(terms.count for terms in self._terms), dtype=np.float32), {}
        return finish_ring(self._totals, self._survivors, self._terms)


def finish_ring(totals: Sequence[RingUpdate], survivors: int, terms: Sequence[FactorTerms]) -> tuple[Vector, Clips]:
    """What summed contributions come to, one total for each of the terms; see `Reduction.finish`.

    Raises:
        PeerError, RunError: they are no sums of that many contributions.
    """
    means = [ring_mean(total, survivors, each) for total, each in zip(totals, terms, strict=True)]
    clips: Clips = {
        each.factor: ClipRange(each.clip).adapt(mean.mean_norm).clip for mean, each in zip(means, terms, strict=True)
    }
    mean_share = means[0].total_weight / survivors  # a client's weight is the same for all its factors
    clips[WEIGHT] = next_weight_cap(mean_share * terms[0].weight_cap)
    return np.concatenate([mean.update for mean in means]), clips
