"""The outermost aggregators, which take payloads, and the mean in a ring.

Payloads are decoded one by one, or added as words of a ring and decoded once. Under masks the outermost is missing:
a secure round gives the ring's mean a cohort's sums, where `Unpacked` gives it each client's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec import ClipRange
from fedtune.core.codec.update_forms import RING, RingTotal, UpdateForm
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.errors import PeerError
from fedtune.core.job.methods import Method
from fedtune.strategies.aggregation.aggregator import (
    Added,
    Aggregate,
    Aggregation,
    Aggregator,
    Clips,
    Frame,
    Payloads,
    Update,
)

Totals = Mapping[FactorTerms, RingTotal]
"""Sums in a ring, one for each of the terms that their clients own."""


@dataclass(frozen=True)
class Decoded:
    """Decodes every payload to an update, and passes it to an aggregator of updates.

    Args:
        form: form in which updates travel.
    """

    inner: Aggregator[Update]
    form: UpdateForm

    @property
    def method(self) -> Method:
        """The inner aggregator's method."""
        return self.inner.method

    def begin(self, frame: Frame) -> Behind[Update]:
        """Returns the inner aggregator's aggregation behind the decoding."""

        def decode(payloads: Payloads) -> Update:
            own = owned_terms(frame.terms, payloads)
            parts = {each: self.form.decode(data, each) for data, each in zip(payloads.parts, own, strict=True)}
            return Update(joined(frame.terms, parts), payloads.weight, payloads.tier)

        return Behind(self.inner.begin(frame), decode)


@dataclass(frozen=True)
class Unpacked:
    """Reads every payload as a sum of one in a ring, and passes it to an aggregator of such sums."""

    inner: Aggregator[Totals]

    @property
    def method(self) -> Method:
        """The inner aggregator's method."""
        return self.inner.method

    def begin(self, frame: Frame) -> Behind[Totals]:
        """Returns the inner aggregator's aggregation behind the reading."""

        def read(payloads: Payloads) -> Totals:
            own = owned_terms(frame.terms, payloads)
            return {each: RING.read(data, each) for data, each in zip(payloads.parts, own, strict=True)}

        return Behind(self.inner.begin(frame), read)


class Behind(Generic[Added]):
    """An aggregation behind a function that every payload passes first.

    Args:
        enter: payloads -> what `inner` takes; raises PeerError where they cannot be read.
    """

    def __init__(self, inner: Aggregation[Added], enter: Callable[[Payloads], Added]) -> None:
        self._inner, self._enter = inner, enter

    def add(self, payloads: Payloads) -> None:
        """Reads the payloads and adds the result.

        Raises:
            PeerError, UpdateError: they cannot be read or added; the aggregation is unchanged.
        """
        self._inner.add(self._enter(payloads))

    def merge(self, other: Behind[Added]) -> None:
        """Merges the inner aggregations."""
        self._inner.merge(other._inner)

    def finish(self) -> Aggregate:
        """Returns the inner aggregate."""
        return self._inner.finish()


@dataclass(frozen=True)
class RingMean:
    """Averages in a ring: takes sums of one client or of many, and decodes no single update.

    Args:
        method: declares which factors rounds train; it must be linear.
    """

    method: Method

    def begin(self, frame: Frame) -> RingAggregation:
        """Returns an empty sum."""
        return RingAggregation(frame)


class RingAggregation:
    """The sum of words in a ring, with one total for each of the round's terms."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._totals: dict[FactorTerms, RingTotal] = {}

    def add(self, totals: Totals) -> None:
        """Adds sums that were formed elsewhere, such as one client's, or those of a whole cohort under masks."""
        joined = {
            each: RING.join(self._totals[each], total, each) if each in self._totals else total
            for each, total in totals.items()
        }
        self._totals |= joined

    def merge(self, other: RingAggregation) -> None:
        """Adds the other's totals."""
        self.add(other._totals)

    def finish(self) -> Aggregate:
        """Returns the mean, and the clips of the next round that trains each factor.

        In a factor with slices, each slice has a mean over its own owners, zero without any. The factor's norm is the
        root of the sum of the squares of the slices' mean norms.

        Raises:
            PeerError, RunError: the totals are no sums of that many contributions.
        """
        terms = self._frame.terms
        summed = {each: self._totals[each] for each in terms if each in self._totals}
        means = {each: RING.mean(total, each) for each, total in summed.items() if total.contributors}
        update = joined(terms, {each: mean.update for each, mean in means.items()})
        if not means:
            return Aggregate(update)
        clips: Clips = {}
        for factor in dict.fromkeys(each.factor for each in means):
            slices = {each: mean.mean_norm for each, mean in means.items() if each.factor == factor}
            norms = [norm for norm in slices.values() if norm is not None]
            if not norms:  # under differential privacy clips follow from the job's terms
                continue
            clip = next(iter(slices)).clip
            norm = math.hypot(*norms)
            seen = sum(each.count for each in slices) / next(iter(slices)).whole
            clips[factor] = ClipRange(clip).adapt(norm / math.sqrt(seen)).clip
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
