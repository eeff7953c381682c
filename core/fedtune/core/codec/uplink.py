"""The terms on which updates travel up in a round: one payload a factor, in the form that the job asks for.

    terms = factor_terms(request.uplink, layout, factors, seed, round_number)

Where devices train different ranks, a factor travels in slices of rank indices, each with its own owners, payload,
weight and sum. `FactorTerms` holds everything on which server and clients agree for one factor, or one slice of it, in
one round; all of it is public. `fedtune.core.codec.update_forms` encodes updates on these terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from fedtune.core.adapter.layout import AdapterLayout, Factor, Factors, factor_letters
from fedtune.core.adapter.tiers import Indices, RankSlice, coordinates, rank_slices
from fedtune.core.codec.coordinate_selection import select_public
from fedtune.core.codec.maskable import RoundContext
from fedtune.core.errors import PeerError
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Uplink
from fedtune.core.seeds import derive_seed


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

        In a ring every value costs the same: its bits and the room that a sum needs. Coordinates that are not sent wait
        for a later round, so many coarse values are best. In the clear positions and values are entropy-coded, and a
        client sends its largest values, so fewer and finer values are best. The presets are rows of
        benchmarks/compression/sweep.md.
        """
        settings = job.compression
        if settings.preset == "none":
            return cls("exact", 8, 1.0, False, None)
        form = job.compression_form
        bits, density = {
            ("balanced", "sparse"): (3, 0.07),
            ("balanced", "ring"): (2, 0.4),
            ("extreme", "sparse"): (3, 0.03),
            ("extreme", "ring"): (2, 0.25),
        }[settings.preset, form]
        return cls(
            form,
            settings.bits or bits,
            settings.density or density,
            settings.error_feedback if settings.error_feedback is not None else True,
            settings.downlink_bits or 2,
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
        factor: "a" or "b".
        count: number of coordinates of the factor, or of the slice.
        selection_phase: number of earlier rounds that trained the factor; the ring's public selection depends on it.
        clip: norm to which a selected update of the whole factor is clipped; ring only.
        part: coordinates of the slice; None for the whole factor.
    """

    uplink: Uplink
    seed: int
    round: int
    factor: Factor
    count: int
    selection_phase: int
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

        The selection is made over the whole factor, so that a coordinate's turn does not depend on its slice. A slice's
        clip is its share of the factor's, c·√(count/whole), as if the update were spread evenly.
        """
        selection = select_public(
            self.whole, self.density, derive_seed(self.seed, "selection", self.factor), self.selection_phase
        )
        return RoundContext(
            seed=derive_seed(self.seed, "codec", self.round, *self.label),
            selection=selection[self.indices],
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
        PeerError: the uplink does not have one selection phase and one clip for each factor, or has no such tier.
    """
    if not len(factors) == len(uplink.selection_phases) == len(uplink.clips):
        counts = f"{len(uplink.selection_phases)} selection phases and {len(uplink.clips)} clips"
        raise PeerError(f"{counts} for the factors {factors}")
    slices = round_slices(uplink, layout, seed, round_number)
    if tier and tier not in uplink.tiers:
        raise PeerError(f"a request to train {tier} rank indices; this round has the tiers {list(uplink.tiers)}")
    terms = []
    for letter, selection_phase, clip in zip(
        factor_letters(factors), uplink.selection_phases, uplink.clips, strict=True
    ):
        segment = layout.segment(letter)
        whole = segment.stop - segment.start
        parts: list[Part | None] = [Part(each.tier, coordinates(layout, letter, each.owned), whole) for each in slices]
        terms += [
            FactorTerms(
                uplink=uplink,
                seed=seed,
                round=round_number,
                factor=letter,
                count=len(part.indices) if part else whole,
                selection_phase=selection_phase,
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


def uplink_weight(uplink: Uplink, examples: int, tokens: int) -> int:
    """Returns a client's weight, 1 to `weight_cap`: its examples, its target tokens, or the cap for all alike."""
    match uplink.weight:
        case "examples":
            return max(1, min(examples, uplink.weight_cap))
        case "tokens":
            return max(1, min(tokens, uplink.weight_cap))
        case "uniform":
            return uplink.weight_cap
