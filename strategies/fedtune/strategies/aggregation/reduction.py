"""From arriving payloads to one aggregate, streaming: decoded one by one, or added in a ring and decoded once.

Both have the same calls, so that a round does not care which one it has:

    reduction.take(payloads, weight, tier)    # refuses with an error and stays unchanged where it cannot
    aggregate, clips = reduction.finish()
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec import ClipRange, next_weight_cap
from fedtune.core.codec.uplink import FactorTerms, RingSum, add_ring, decode_factor, ring_mean, ring_zero
from fedtune.core.errors import PeerError
from fedtune.strategies.aggregation import NOTHING, Accumulator, State

Clips = dict[str, float]
WEIGHT = "weight"  # the place of the weight cap among a ring's clips


class Reduction(Protocol):
    """The reduction of one round, under way."""

    def take(self, payloads: Sequence[bytes], weight: int, tier: int = 0) -> None:
        """Adds one client's payloads, one for each of the terms of its tier; 0 is the tier of all where all are alike.

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

    def take(self, payloads: Sequence[bytes], weight: int, tier: int = 0) -> None:
        own = owned_terms(self._terms, tier)
        _check_number(payloads, own)
        parts = {each: decode_factor(data, each) for data, each in zip(payloads, own, strict=True)}
        self._accumulator.add(_joined(self._terms, parts), weight, tier)

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
        self._totals = {each: ring_zero(each) for each in terms}

    def take(self, payloads: Sequence[bytes], weight: int, tier: int = 0) -> None:
        del weight
        own = owned_terms(self._terms, tier)
        _check_number(payloads, own)
        self._totals |= {
            each: add_ring(self._totals[each], data, each) for data, each in zip(payloads, own, strict=True)
        }

    def finish(self) -> tuple[Vector, Clips]:
        return finish_ring([self._totals[each] for each in self._terms], self._terms)


def owned_terms(terms: Sequence[FactorTerms], tier: int) -> list[FactorTerms]:
    """Those that a client of this tier sends; all where all are alike."""
    return [each for each in terms if each.tier <= tier or not tier]


def finish_ring(totals: Sequence[RingSum], terms: Sequence[FactorTerms]) -> tuple[Vector, Clips]:
    """What summed contributions come to, one total for each of the terms; see `Reduction.finish`.

    Of a factor in slices, each has a mean over its own owners, zero where it had none, and the factor's norm is the
    root of the sum of the squares of the slices' mean norms.

    Raises:
        PeerError, RunError: they are no sums of that many contributions.
    """
    means = {each: ring_mean(total, each) for total, each in zip(totals, terms, strict=True) if total.contributors}
    aggregate = _joined(terms, {each: mean.update for each, mean in means.items()})
    if not means:
        return aggregate, {}
    clips: Clips = {}
    for factor in dict.fromkeys(each.factor for each in means):
        slices = {each: mean for each, mean in means.items() if each.factor == factor}
        clip = next(iter(slices)).clip
        norm = math.hypot(*(mean.mean_norm for mean in slices.values()))
        seen = sum(each.count for each in slices) / next(iter(slices)).whole
        clips[factor] = ClipRange(clip).adapt(norm / math.sqrt(seen)).clip
    first = next(iter(means))  # everybody owns it; a client's weight is the same for all that it sends
    mean_share = means[first].total_weight / max(total.contributors for total in totals)
    clips[WEIGHT] = next_weight_cap(mean_share * first.weight_cap)
    return aggregate, clips


def _joined(terms: Sequence[FactorTerms], parts: Mapping[FactorTerms, Vector]) -> Vector:
    """Over the segment of the round's factors; zero where there is no part."""
    factors = {each.factor: np.zeros(each.whole, dtype=np.float32) for each in terms}
    for each, part in parts.items():
        factors[each.factor][each.indices] = part
    return np.concatenate(list(factors.values()))


def _check_number(payloads: Sequence[bytes], terms: Sequence[FactorTerms]) -> None:
    if len(payloads) != len(terms):
        expected = ", ".join(each.factor + (f" (tier {each.tier})" if each.tier else "") for each in terms)
        raise PeerError(f"{len(payloads)} payloads; expected one for each of the factors {expected}")
