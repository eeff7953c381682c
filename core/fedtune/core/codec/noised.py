"""The codec for sums with differential privacy: a grid, rounding with a bounded norm, and noise, in a ring.

    client    z = round(H·D·clip_c(x)/√d · g/c), ‖z‖ <= Δ;   u = z + N_Z(0, σ²)   modulo 2^ℓ
    sum       Σu in Z/2^ℓ                                                         (secure aggregation)
    server    y' = centred(Σu)·c/(g·|S|);   mean = (H·D/√d)⁻¹ y'·min(1, B/‖y'‖)

`fedtune.core.privacy.mechanism` says which g, Δ, σ and ℓ give a sum the privacy of its round. There are no auxiliary
sums: norms and losses would need noise of their own, so the clip follows from the job's terms, and the loss is unknown.

Without noise on the devices the server adds it (`own_noise`), as one contribution more that counts as no client; then
what it sees before is not private.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.clipping import clip_factor, finite_norm
from fedtune.core.codec.maskable import DecodedSum, RingUpdate, RoundContext
from fedtune.core.codec.rotation import rotated_size, unrotate
from fedtune.core.errors import PeerError, RunError
from fedtune.core.privacy.bounded_rounding import round_bounded
from fedtune.core.privacy.discrete_gaussian import KEY_BYTES, KeyStream, Stream, discrete_gaussian
from fedtune.core.privacy.mechanism import Noise, fit_noise

_NONE = np.zeros(0, dtype=np.uint32)


@dataclass(frozen=True)
class NoisedCodec:
    """Encodes updates as noised ring words, and decodes the sum of words to the noised mean.

    Args:
        rho: ρ of a sum of this segment.
        noised: h, the clients whose noise is in a sum for certain; 0 where the server adds the noise.
    """

    rho: float
    noised: int
    auxiliary_sums: ClassVar[int] = 0

    def noise(self, context: RoundContext) -> Noise:
        """Returns the noise of a segment; raises JobError where there is none that fits."""
        return fit_noise(self.word_count(context), noised=max(self.noised, 1), n_max=context.n_max, rho=self.rho)

    def word_count(self, context: RoundContext) -> int:
        """Returns the number of words of a contribution: its coordinates and the rotation's padding."""
        return rotated_size(context.count) if context.rotation else context.count

    def width(self, context: RoundContext) -> int:
        """Returns ℓ, the bits of a word."""
        return self.noise(context).width

    def encode(self, update: NDArray[np.float32], private_seed: int, context: RoundContext) -> RingUpdate:
        """Encodes one client's contribution, with its share of the noise.

        Args:
            update: the client update; float32, shape (count,).
            private_seed: 32 bytes as a number, which nobody else knows, and used for nothing else.

        Raises:
            UpdateError: the update has another size, or holds NaN, infinity or an absurd magnitude.
        """
        noise, stream = self.noise(context), KeyStream(private_seed.to_bytes(KEY_BYTES, "big"))
        values, _ = context.prepared(update)
        values *= np.float32(noise.norm / context.clip)
        whole = round_bounded(values, noise.longest, stream)
        if self.noised:
            whole += discrete_gaussian(noise.variance, whole.size, stream)
        return RingUpdate(_words(whole, noise.width), _NONE)

    def own_noise(self, stream: Stream, context: RoundContext) -> RingUpdate:
        """Returns the noise of a whole sum, which the server adds where devices add none."""
        noise = self.noise(context)
        return RingUpdate(
            _words(discrete_gaussian(noise.variance, self.word_count(context), stream), noise.width), _NONE
        )

    def add(self, left: RingUpdate, right: RingUpdate, context: RoundContext) -> RingUpdate:
        """Returns the sum in the ring."""
        return RingUpdate((left.words + right.words) & np.uint32((1 << self.width(context)) - 1), _NONE)

    def decode_sum(self, total: RingUpdate, survivors: int, context: RoundContext) -> DecodedSum:
        """Returns the noised mean of the `survivors` contributions in `total`.

        Raises:
            RunError: there are no survivors or more than n_max.
            PeerError: the sum has another size.
        """
        noise, expected = self.noise(context), self.word_count(context)
        if total.words.shape != (expected,) or total.auxiliary.size:
            raise PeerError(f"a noised sum of {expected} words is expected, got {total.words.size}")
        if not 1 <= survivors <= context.n_max:
            raise RunError(f"a sum has 1 to {context.n_max} survivors in this ring, got {survivors}")
        half = 1 << (noise.width - 1)
        centred = ((total.words.astype(np.int64) + half) & ((1 << noise.width) - 1)) - half
        step = context.clip / noise.norm
        values = (centred * (step / survivors)).astype(np.float32)
        values *= np.float32(clip_factor(finite_norm(values), self._longest_mean(survivors, context)))
        if context.rotation:
            values = unrotate(values, context.count, context.seed)
        return DecodedSum(values)

    def _longest_mean(self, survivors: int, context: RoundContext) -> float:
        """Returns B, the largest norm that a mean of honest contributions is expected to have."""
        noise = self.noise(context)
        contributions = survivors if self.noised else 1
        variance = contributions * noise.variance.value + survivors / 4
        return context.clip / noise.norm * hypot(noise.norm, sqrt(self.word_count(context) * variance) / survivors)


def _words(whole: NDArray[np.int64], width: int) -> NDArray[np.uint32]:
    """Returns whole numbers modulo 2^ℓ."""
    return (whole & ((1 << width) - 1)).astype(np.uint32)
