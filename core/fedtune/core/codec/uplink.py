"""The terms on which updates travel up in a round: one payload a factor, in the form that the job asks for.

    terms = factor_terms(request.uplink, layout, factors, seed, round_number)

Where devices train different ranks, a factor travels in slices of rank indices, each with its own owners, payload
and sum. `FactorTerms` holds everything on which server and clients agree for one factor, or one slice of it, in
one round; all of it is public. `fedtune.core.codec.update_forms` encodes updates on these terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from fedtune.core.adapter.layout import AdapterLayout, Factor, Factors, Indices, factor_letters
from fedtune.core.adapter.tiers import RankSlice, rank_slices
from fedtune.core.codec.maskable import RoundContext
from fedtune.core.errors import PeerError
from fedtune.core.job.contradictions import NO_FEEDBACK_IN_A_RING
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Uplink
from fedtune.core.seeds import derive_seed

REBASED_DOWNLINK_BITS = 8


@dataclass(frozen=True)
class Compression:
    """A job's [compression] with its preset filled in.

    Args:
        form: form of the updates; "exact" is float32. `CompressionSettings` explains the others and the other fields.
    """

    form: str
    bits: int
    density: float
    error_feedback: bool
    downlink_bits: int | None
    rotation: bool = True

    @classmethod
    def of(cls, job: Job) -> Compression:
        """Resolves a job's [compression]; secure aggregation needs a ring.

        By default nothing is kept on a device: all values travel, rounded coarsely and without bias, so that a client
        may take part once or always. Only the form "sparse" leaves values out, and keeps a residual. The presets are
        rows of benchmarks/compression/mean_error.md. A change of basis makes the change since the first adapter as
        large as the adapter itself, so the downlink is finer then.
        """
        settings = job.compression
        if settings.preset == "none":
            return cls("exact", 8, 1.0, False, None)
        form = job.compression_form
        bits, density, downlink_bits = {
            ("balanced", "dense"): (3, 1.0, 4),
            ("balanced", "sparse"): (3, 0.07, 4),
            ("balanced", "ring"): (3, 1.0, 4),
            ("extreme", "dense"): (2, 1.0, 3),
            ("extreme", "sparse"): (3, 0.03, 3),
            ("extreme", "ring"): (2, 1.0, 3),
        }[settings.preset, form]
        return cls(
            form,
            settings.bits or bits,
            settings.density or density,
            settings.error_feedback if settings.error_feedback is not None else form == "sparse",
            settings.downlink_bits or (REBASED_DOWNLINK_BITS if job.federation.rebalance_every else downlink_bits),
            settings.rotation if settings.rotation is not None else True,
        )


@dataclass(frozen=True, eq=False)
class Part:
    """The coordinates of a factor that belong to a slice of its rank indices.

    Args:
        tier: smallest tier that owns the slice.
        indices: positions in the factor, int, ascending.
        whole: number of coordinates of the factor.
    """

    tier: int
    indices: Indices
    whole: int


@dataclass(frozen=True)
class FactorTerms:
    """The terms of one factor, or of a slice of it, in one round.

    Args:
        uplink: settings of the round, the same for all factors.
        seed: seed of the job.
        round: number of the round.
        factor: the factor's letter.
        count: number of coordinates of the factor, or of the slice.
        clip: norm to which an update of the whole factor is clipped; ring only.
        part: coordinates of the slice; None for the whole factor.
    """

    uplink: Uplink
    seed: int
    round: int
    factor: Factor
    count: int
    clip: float
    part: Part | None = None

    @property
    def form(self) -> str:
        """The name of the form in which the factor travels."""
        return self.uplink.form

    @property
    def bits(self) -> int:
        """The resolution of a value, as in `Compression`."""
        return self.uplink.bits

    @property
    def density(self) -> float:
        """The share of coordinates that travel."""
        return self.uplink.density

    @property
    def rho(self) -> float:
        """ρ of a sum on these terms, an equal part of the round's; 0 without differential privacy."""
        return self.uplink.rho / (len(self.uplink.clips) * max(1, len(self.uplink.tiers)))

    @property
    def noised(self) -> int:
        """The number of clients whose noise is in the sum for certain; 0 where the server adds the noise."""
        counts = self.uplink.noised
        return counts[self.uplink.tiers.index(self.tier) if self.part else 0] if counts else 0

    @property
    def tier(self) -> int:
        """The smallest tier that sends this slice; 0 where all clients send the whole factor."""
        return self.part.tier if self.part else 0

    @property
    def whole(self) -> int:
        """The number of coordinates of the whole factor."""
        return self.part.whole if self.part else self.count

    @property
    def indices(self) -> Indices | slice:
        """The positions of these coordinates in the factor."""
        return self.part.indices if self.part else slice(None)

    @property
    def label(self) -> tuple[str | int, ...]:
        """The label that distinguishes the random streams of these terms."""
        return (self.factor, self.part.tier) if self.part else (self.factor,)

    def context(self) -> RoundContext:
        """Returns the ring codec's view of these terms.

        A slice's clip is its share of the factor's, c·√(count/whole), as if the update were spread evenly.
        """
        return RoundContext(
            seed=derive_seed(self.seed, "codec", self.round, *self.label),
            count=self.count,
            clip=self.clip * sqrt(self.count / self.whole),
            n_max=self.uplink.n_max,
            rotation=self.uplink.rotation,
        )


def factor_terms(
    uplink: Uplink, layout: AdapterLayout, factors: Factors, seed: int, round_number: int, tier: int = 0
) -> tuple[FactorTerms, ...]:
    """Returns the terms of every factor that a round trains, slice by slice, in the order of their payloads.

    Args:
        tier: leaves out the slices that clients of this tier do not send; 0 for all.

    Raises:
        PeerError: the adapter has no such factor; or the uplink does not have one clip for each factor, one number of
            noised clients for each slice or such a tier; or it asks devices to carry a residual into a sum.
    """
    if not set(factors) <= set(layout.factors):
        raise PeerError(f"a request to train the factors {factors}; the adapter has {layout.factors}")
    if uplink.form == "ring" and uplink.error_feedback:
        raise PeerError(f"a request for error feedback in a ring: {NO_FEEDBACK_IN_A_RING}")
    if len(factors) != len(uplink.clips):
        raise PeerError(f"{len(uplink.clips)} clips for the factors {factors}")
    slices = round_slices(uplink, layout, seed, round_number)
    if len(uplink.noised) not in (0, max(1, len(slices))):
        raise PeerError(f"{len(uplink.noised)} numbers of noised clients for {max(1, len(slices))} slices")
    if tier and tier not in uplink.tiers:
        raise PeerError(f"a request to train {tier} rank indices; this round has the tiers {list(uplink.tiers)}")
    terms = []
    for letter, clip in zip(factor_letters(factors), uplink.clips, strict=True):
        segment = layout.segment(letter)
        whole = segment.stop - segment.start
        parts: list[Part | None] = [Part(each.tier, each.coordinates(layout, letter), whole) for each in slices]
        terms += [
            FactorTerms(
                uplink=uplink,
                seed=seed,
                round=round_number,
                factor=letter,
                count=len(part.indices) if part else whole,
                clip=clip,
                part=part,
            )
            for part in parts or [None]
            if not (tier and part) or part.tier <= tier
        ]
    return tuple(terms)


def round_slices(uplink: Uplink, layout: AdapterLayout, seed: int, round_number: int) -> tuple[RankSlice, ...]:
    """Returns the slices of a round of mixed ranks, smallest tier first; none where all clients train all ranks.

    Raises:
        PeerError: the tiers do not ascend to at most the adapter's rank.
    """
    if not uplink.tiers:
        return ()
    if uplink.tiers[-1] > layout.rank or any(low >= high for low, high in pairwise(uplink.tiers)):
        raise PeerError(f"the tiers {list(uplink.tiers)}; expected them to ascend, to at most {layout.rank}")
    return rank_slices(seed, round_number, layout.rank, uplink.tiers)
