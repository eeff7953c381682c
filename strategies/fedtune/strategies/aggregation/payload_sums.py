"""The outermost aggregators, which take payloads: decoded one by one, or added in a ring and decoded once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec import ClipRange, next_weight_cap
from fedtune.core.codec.update_forms import RING, RingTotal, UpdateForm
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.errors import PeerError
from fedtune.core.job.methods import Method
from fedtune.strategies.aggregation.aggregator import (
    Aggregate,
    Aggregation,
    Aggregator,
    Clips,
    Frame,
    Payloads,
    Update,
)

WEIGHT = "weight"  # the key of the weight cap among a ring's clips


@dataclass(frozen=True)
class Decoded:
    """Decodes every update, and passes it to an aggregator of updates.

    Args:
        form: form in which updates travel.
    """

    inner: Aggregator
    form: UpdateForm

    @property
    def method(self) -> Method:
        """The inner aggregator's method."""
        return self.inner.method

    def begin(self, frame: Frame) -> Decoding:
        """Returns the inner aggregator's aggregation behind the decoding."""
        return Decoding(frame, self.inner.begin(frame), self.form)


class Decoding:
    """Decodes payloads on their way into an aggregation of updates."""

    def __init__(self, frame: Frame, inner: Aggregation[Update], form: UpdateForm) -> None:
        self._frame, self._inner, self._form = frame, inner, form

    def add(self, payloads: Payloads) -> None:
        """Decodes the payloads and adds the update that they carry.

        Raises:
            PeerError, UpdateError: they cannot be decoded or added; the aggregation is unchanged.
        """
        own = owned_terms(self._frame.terms, payloads)
        parts = {each: self._form.decode(data, each) for data, each in zip(payloads.parts, own, strict=True)}
        self._inner.add(Update(joined(self._frame.terms, parts), payloads.weight, payloads.tier))

    def merge(self, other: Decoding) -> None:
        """Merges the inner aggregations."""
        self._inner.merge(other._inner)

    def finish(self) -> Aggregate:
        """Returns the inner aggregate."""
        return self._inner.finish()


@dataclass(frozen=True)
class RingMean:
    """Averages in a ring: no single update is decoded, and the weights travel inside the payloads.

    Args:
        method: declares which factors rounds train; it must be linear.
    """

    method: Method

    def begin(self, frame: Frame) -> RingAggregation:
        """Returns an empty sum."""
        return RingAggregation(frame, {each: RING.zero(each) for each in frame.terms})


class RingAggregation:
    """The sum of words in a ring, with one total for each of the round's terms."""

    def __init__(self, frame: Frame, totals: Mapping[FactorTerms, RingTotal]) -> None:
        self._frame = frame
        self._totals = dict(totals)

    def add(self, payloads: Payloads) -> None:
        """Adds one client's words.

        Raises:
            PeerError: they are not one client's words; the totals are unchanged.
        """
        own = owned_terms(self._frame.terms, payloads)
        self._totals |= {
            each: RING.add(self._totals[each], data, each) for data, each in zip(payloads.parts, own, strict=True)
        }

    def merge(self, other: RingAggregation) -> None:
        """Adds the other's totals."""
        self.merge_totals([other._totals[each] for each in self._frame.terms])

    def merge_totals(self, totals: Sequence[RingTotal]) -> None:
        """Adds sums that were formed elsewhere, one for each of the round's terms, such as those under masks."""
        self._totals |= {
            each: RING.join(self._totals[each], total, each)
            for each, total in zip(self._frame.terms, totals, strict=True)
        }

    def finish(self) -> Aggregate:
        """Returns the mean, and the clips of the next round that trains each factor.

        In a factor with slices, each slice has a mean over its own owners, zero without any. The factor's norm is the
        root of the sum of the squares of the slices' mean norms.

        Raises:
            PeerError, RunError: the totals are no sums of that many contributions.
        """
        terms = self._frame.terms
        means = {each: RING.mean(total, each) for each, total in self._totals.items() if total.contributors}
        update = joined(terms, {each: mean.update for each, mean in means.items()})
        if not means:
            return Aggregate(update)
        clips: Clips = {}
        for factor in dict.fromkeys(each.factor for each in means):
            slices = {each: mean for each, mean in means.items() if each.factor == factor}
            clip = next(iter(slices)).clip
            norm = math.hypot(*(mean.mean_norm for mean in slices.values()))
            seen = sum(each.count for each in slices) / next(iter(slices)).whole
            clips[factor] = ClipRange(clip).adapt(norm / math.sqrt(seen)).clip
        first = next(iter(means))  # all clients own it; a client's weight is the same in all its parts
        mean_share = means[first].total_weight / max(total.contributors for total in self._totals.values())
        clips[WEIGHT] = next_weight_cap(mean_share * first.uplink.weight_cap)
        return Aggregate(update, clips=clips)


def owned_terms(terms: Sequence[FactorTerms], payloads: Payloads) -> list[FactorTerms]:
    """Returns the terms for which a client of this tier sends payloads; all of them in a round without tiers.

    Raises:
        PeerError: the client has sent another number of payloads.
    """
    own = [each for each in terms if each.tier <= payloads.tier or not payloads.tier]
    if len(payloads.parts) != len(own):
        expected = ", ".join(each.factor + (f" (tier {each.tier})" if each.tier else "") for each in own)
        raise PeerError(f"{len(payloads.parts)} payloads; expected one for each of the factors {expected}")
    return own


def joined(terms: Sequence[FactorTerms], parts: Mapping[FactorTerms, Vector]) -> Vector:
    """Joins the parts over the segment of the round's factors; zero where a part is missing."""
    factors = {each.factor: np.zeros(each.whole, dtype=np.float32) for each in terms}
    for each, part in parts.items():
        factors[each.factor][each.indices] = part
    return np.concatenate(list(factors.values()))
