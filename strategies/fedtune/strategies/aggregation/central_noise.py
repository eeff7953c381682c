"""Noise that the server adds to a sum, where devices add none: CentrallyNoised(RingMean(method), of_entropy).

The server is trusted with the sum before the noise, and under masks with nothing else. The noise is one contribution
more that counts as no client; of several groups each has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.codec.noise_seeds import NoiseSeed
from fedtune.core.codec.noised import NoisedCodec
from fedtune.core.codec.update_forms import RingTotal
from fedtune.core.job.methods import Method
from fedtune.core.privacy.discrete_gaussian import KEY_BYTES, KeyStream
from fedtune.strategies.aggregation.aggregator import Aggregate, Aggregation, Aggregator, Frame
from fedtune.strategies.aggregation.payload_sums import Totals


@dataclass(frozen=True)
class CentrallyNoised:
    """Adds noise to the sums of another aggregator before they are decoded."""

    inner: Aggregator[Totals]
    seed: NoiseSeed

    @property
    def method(self) -> Method:
        """The inner aggregator's method."""
        return self.inner.method

    def begin(self, frame: Frame) -> NoisedSums:
        """Returns an empty aggregation."""
        return NoisedSums(self.inner.begin(frame), frame, self.seed)


class NoisedSums:
    """Sums of a round, to which noise is added once, when they are complete."""

    def __init__(self, inner: Aggregation[Totals], frame: Frame, seed: NoiseSeed) -> None:
        self._inner, self._frame, self._seed = inner, frame, seed

    def add(self, totals: Totals) -> None:
        """Adds sums without noise."""
        self._inner.add(totals)

    def merge(self, other: NoisedSums) -> None:
        """Adds the other's sums, which have no noise yet."""
        self._inner.merge(other._inner)

    def finish(self) -> Aggregate:
        """Adds the noise, and returns the inner aggregate."""
        noise = {}
        for each in self._frame.terms:
            stream = KeyStream(self._seed("the server", each).to_bytes(KEY_BYTES, "big"))
            codec = NoisedCodec(each.rho, each.noised)
            noise[each] = RingTotal(codec.own_noise(stream, each.context()), 0)
        self._inner.add(noise)
        return self._inner.finish()
