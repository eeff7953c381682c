"""The codec for updates under masks. Every step is linear and public, so words can be added before they are decoded.

    client    y = H·D·clip_c(x)/√d;  u = quantize(y, ±R) in 0..L                    -> words, sums
    sum       Σu in Z/2^ℓ, Σmin(‖x‖, 4c) in Z/2^32                                  (secure aggregation)
    server    y' = (δ·Σu - |S|·R)/|S|;  mean = (H·D/√d)⁻¹ y'·min(1, B/‖y'‖),  B² = c² + d·δ²/(4·|S|)

Without rotation, H·D/√d is the identity, and nothing is padded.

All contributions weigh the same. A sum of weights would tell how many examples clients have once cohorts change, and a
client that contributes a wrong weight, which masks hide, could make the divisor as small as it likes. B bounds what the
words of one client can do: a mean of honest updates is no longer than c, but for rounding errors, whose variance is at
most δ²/4 a value and client.

A device keeps nothing of what clip and rounding leave out. Rounding is unbiased, so its errors average out over clients
and rounds, whether a client takes part once or always. A rest that a device adds to a later update would be a memory
that the later round's configuration does not name: a server that chooses cohorts and deadlines could arrange a sum in
which all other updates are known, and read one client's (docs/secure-aggregation.md).

Usage in the clear, for one segment:

    context = RoundContext(seed, count, clip.clip, n_max=len(cohort))
    total = codec.zero(context)
    for update, private_seed in cohort:
        total = codec.add(total, codec.encode(update, private_seed, context), context)
    mean = codec.decode_sum(total, len(cohort), context)
    clip = clip.adapt(mean.mean_norm)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.clipping import MAX_NORM, MIN_CLIP, NORM_BOUND, check_update, clip_factor, finite_norm
from fedtune.core.codec.quantization import dequantize_sum, public_range, quantize
from fedtune.core.codec.ring import Ring, auxiliary_total, norm_word
from fedtune.core.codec.rotation import rotate, rotated_size, unrotate
from fedtune.core.errors import PeerError, UpdateError

AUXILIARY_SUMS = 1


@dataclass(frozen=True)
class RoundContext:
    """The parameters of one segment in one round, on which the cohort agrees; all of them are public.

    Args:
        seed: the segment's public seed of this round: `derive_seed(job seed, "codec", round, segment)`.
        count: number of coordinates.
        clip: c > 0, the norm to which each update is clipped.
        n_max: the most clients that are ever added in this ring.
        rotation: whether values are rotated before they are rounded. Without rotation the few large values are clipped
            at ±R, and their rest is lost.

    Raises:
        PeerError: no update could have the clip as its norm; devices receive it from the server.
    """

    seed: int
    count: int
    clip: float
    n_max: int
    rotation: bool = True

    def __post_init__(self) -> None:
        if not MIN_CLIP <= self.clip <= MAX_NORM:
            raise PeerError(f"a clip lies in {MIN_CLIP} to {MAX_NORM:.3g}, got {self.clip}")

    def prepared(self, update: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Returns a client's update clipped and, where the round rotates, rotated; and its norm before that.

        Args:
            update: float32, shape (count,).

        Raises:
            UpdateError: the update has another size, or holds NaN, infinity or an absurd magnitude.
        """
        norm = check_update(update)
        if update.size != self.count:
            raise UpdateError(f"this segment has {self.count} coordinates, the update has {update.size}")
        values = update * np.float32(clip_factor(norm, self.clip))
        return (rotate(values, self.seed) if self.rotation else values), norm


@dataclass(frozen=True)
class RingUpdate:
    """One client's contribution or a sum of several, as secure aggregation masks and adds it.

    Args:
        words: uint32, shape (word_count,), below 2^ℓ; those of a single contribution are at most L.
        auxiliary: uint32, shape (AUXILIARY_SUMS,), modulo 2^32: the norm over 4c, in units of 2^-16.
    """

    words: NDArray[np.uint32]
    auxiliary: NDArray[np.uint32]


@dataclass(frozen=True)
class DecodedSum:
    """A decoded sum: the mean update (float32), and the mean norm where the sum tells it."""

    update: NDArray[np.float32]
    mean_norm: float | None = None


@dataclass(frozen=True)
class MaskableCodec:
    """Encodes updates as ring words, and decodes the sum of words to the mean update.

    Args:
        bits: b, 1 to 8, the least resolution of a value.
    """

    bits: int
    auxiliary_sums: ClassVar[int] = AUXILIARY_SUMS

    def ring(self, context: RoundContext) -> Ring:
        """Returns the ring in which the context's words are added; raises JobError if there is none."""
        return Ring(self.bits, context.n_max)

    def width(self, context: RoundContext) -> int:
        """Returns ℓ, the bits of a word."""
        return self.ring(context).width

    def word_count(self, context: RoundContext) -> int:
        """Returns the number of words of a contribution: its coordinates and the rotation's padding."""
        return rotated_size(context.count) if context.rotation else context.count

    def encode(self, update: NDArray[np.float32], private_seed: int, context: RoundContext) -> RingUpdate:
        """Encodes one client's contribution.

        Args:
            update: the client update; float32, shape (count,).
            private_seed: seed of the rounding, different for every client, segment and round.
            context: the parameters on which the cohort agreed.

        Raises:
            UpdateError: the update has another size, or holds NaN, infinity or an absurd magnitude.
            JobError: there is no ring for these bits and n_max.
        """
        levels = self.ring(context).levels
        values, norm = context.prepared(update)
        words = quantize(values, self._bound(context), levels, private_seed)
        return RingUpdate(words, np.array([norm_word(norm, NORM_BOUND * context.clip)], dtype=np.uint32))

    def zero(self, context: RoundContext) -> RingUpdate:
        """Returns the empty sum."""
        return RingUpdate(
            np.zeros(self.word_count(context), dtype=np.uint32), np.zeros(AUXILIARY_SUMS, dtype=np.uint32)
        )

    def add(self, left: RingUpdate, right: RingUpdate, context: RoundContext) -> RingUpdate:
        """Returns the sum in the ring; auxiliary sums wrap around at 2^32, as uint32 does."""
        return RingUpdate(self.ring(context).add(left.words, right.words), left.auxiliary + right.auxiliary)

    def decode_sum(self, total: RingUpdate, survivors: int, context: RoundContext) -> DecodedSum:
        """Returns the mean of the `survivors` contributions in `total`, no longer than such a mean can be.

        Raises:
            RunError: there are no survivors or more than n_max.
            PeerError: the sum has another size, or cannot be the sum of that many contributions.
        """
        expected = self.word_count(context)
        if total.words.shape != (expected,) or total.auxiliary.shape != (AUXILIARY_SUMS,):
            raise PeerError(
                f"a masked sum of {expected} words and {AUXILIARY_SUMS} auxiliary sum is expected, "
                f"got {total.words.size} and {total.auxiliary.size}"
            )
        self.ring(context).check_sum(total.words, survivors)
        norms = auxiliary_total(int(total.auxiliary[0]), survivors)
        values = dequantize_sum(total.words, self._bound(context), self.ring(context).levels, survivors)
        values /= np.float32(survivors)
        values *= np.float32(clip_factor(finite_norm(values), self.longest_mean(survivors, context)))
        if context.rotation:
            values = unrotate(values, context.count, context.seed)
        return DecodedSum(values, NORM_BOUND * context.clip * norms / survivors)

    def longest_mean(self, survivors: int, context: RoundContext) -> float:
        """Returns B, the largest norm that a mean of honest contributions is expected to have."""
        step = 2 * self._bound(context) / self.ring(context).levels
        return hypot(context.clip, step * sqrt(self.word_count(context) / survivors) / 2)

    def _bound(self, context: RoundContext) -> float:
        return public_range(context.clip, self.word_count(context), self.ring(context).levels, context.n_max)
