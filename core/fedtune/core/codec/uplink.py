"""How one client's update travels up: one payload a factor, by the codec the job asks for, in the clear or in a ring.

Where devices train different ranks, a factor travels in slices of rank indices, each with owners, payload, weight and
sum of its own.

    payload, sent = encode_factor(x, terms, private_seed, weight)        # on the client; x - sent is its residual
    vector = decode_factor(payload, terms)                               # on the server, forms "exact" and "sparse"
    total = add_ring(total, payload, terms)                              # on the server, form "ring"; a RingSum
    mean = ring_mean(total, terms)

`FactorTerms` is what server and clients agree on for one factor, or one slice of it, in one round; all of it is public.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal

import numpy as np

from fedtune.core.adapter.layout import AdapterLayout, Factor, Factors, Vector, factor_letters
from fedtune.core.adapter.tiers import Indices, RankSlice, coordinates, rank_slices
from fedtune.core.codec import ExactCodec, MaskableCodec, RingMean, RingUpdate, RoundContext, SparseCodec
from fedtune.core.codec.coordinate_selection import select_public
from fedtune.core.codec.maskable import AUXILIARY_SUMS
from fedtune.core.codec.packing import pack, packed_size, unpack
from fedtune.core.codec.wire import Kind, frame, unframe
from fedtune.core.errors import PeerError
from fedtune.core.job.settings import Job
from fedtune.core.protocol.payloads import Uplink
from fedtune.core.seeds import derive_seed

Form = Literal["exact", "sparse", "ring"]

_AUXILIARY_BYTES = 4 * AUXILIARY_SUMS


@dataclass(frozen=True)
class Compression:
    """A job's [compression] with its preset filled in.

    Args:
        form: "exact" is float32; see `CompressionSettings` for the others and for the numbers.
    """

    form: Form
    bits: int
    density: float
    error_feedback: bool
    downlink_bits: int | None
    rotation: bool = True

    @classmethod
    def of(cls, job: Job) -> Compression:
        """The numbers that a job's settings mean; secure aggregation needs a ring.

        A ring pays for a value's bits and for the room that a sum needs, wherever the value is, and what is not sent
        waits for its turn: many coarse values are the better bargain. In the clear both the place and the value are
        entropy-coded, and a client sends what matters most: fewer, finer values. The presets are rows of
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
    """The coordinates of a factor that a slice of its rank indices has.

    Args:
        tier: the smallest that owns them.
        places: in the factor, int, ascending.
        whole: coordinates of the factor.
    """

    tier: int
    indices: Indices
    whole: int


@dataclass(frozen=True)
class FactorTerms:
    """What a cohort agrees on for one factor, or a slice of it, in one round.

    Args:
        form, bits, density: as in `Compression`.
        count: coordinates of the factor, or of the slice.
        seed: the job's.
        round: number of the round.
        turn: how many rounds before this one trained the factor; it moves the ring's public selection on.
        clip: norm to which a selected update of the whole factor is clipped; ring only.
        n_max: most clients that are ever added; ring only.
        rotation: as in `Compression`; ring only.
        weight_cap: the weight, in examples or tokens, that counts as one; ring only.
        part: which coordinates of the factor; None for all.
    """

    form: Form
    bits: int
    density: float
    count: int
    seed: int
    round: int
    factor: Factor
    selection_phase: int
    clip: float
    n_max: int
    rotation: bool = True
    weight_cap: int = 1
    part: Part | None = None

    @property
    def tier(self) -> int:
        """The smallest tier that sends this; 0 where all send everything."""
        return self.part.tier if self.part else 0

    @property
    def whole(self) -> int:
        """Coordinates of the factor."""
        return self.part.whole if self.part else self.count

    @property
    def indices(self) -> Indices | slice:
        """Where these coordinates lie in the factor."""
        return self.part.indices if self.part else slice(None)

    @property
    def label(self) -> tuple[str | int, ...]:
        """What random streams of these terms are told apart by."""
        return (self.factor, self.part.tier) if self.part else (self.factor,)

    def context(self) -> RoundContext:
        """The ring codec's view of these terms.

        Turns are taken over the whole factor, so that a coordinate's turn does not depend on whose slice it is in. A
        slice's clip is its share of the factor's, c·√(count/whole), as if the update were spread evenly.
        """
        selection = select_public(
            self.whole, self.density, derive_seed(self.seed, "selection", self.factor), self.selection_phase
        )
        return RoundContext(
            seed=derive_seed(self.seed, "codec", self.round, *self.label),
            selection=selection[self.indices],
            clip=self.clip * sqrt(self.count / self.whole),
            n_max=self.n_max,
            rotation=self.rotation,
        )


def factor_terms(
    uplink: Uplink, layout: AdapterLayout, factors: Factors, seed: int, round_number: int, tier: int = 0
) -> tuple[FactorTerms, ...]:
    """The terms of every factor that a round trains, slice by slice, in the order in which their payloads travel.

    Args:
        tier: leaves out what clients of this tier do not send; 0 for all.

    Raises:
        PeerError: the uplink does not have one turn and one clip for each of them, or no such tier.
    """
    if not len(factors) == len(uplink.selection_phases) == len(uplink.clips):
        raise PeerError(f"{len(uplink.selection_phases)} turns and {len(uplink.clips)} clips for the factors {factors}")
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
                uplink.form,
                uplink.bits,
                uplink.density,
                len(part.indices) if part else whole,
                seed,
                round_number,
                letter,
                selection_phase,
                clip,
                uplink.n_max,
                uplink.rotation,
                uplink.weight_cap,
                part,
            )
            for part in parts or [None]
            if not (tier and part) or part.tier <= tier
        ]
    return tuple(terms)


def round_slices(uplink: Uplink, layout: AdapterLayout, seed: int, round_number: int) -> tuple[RankSlice, ...]:
    """The slices of a round of mixed ranks, smallest tier first; none where everybody trains everything.

    Raises:
        PeerError: the tiers do not ascend to at most the adapter's rank.
    """
    if not uplink.tiers:
        return ()
    if uplink.tiers[-1] > layout.rank or any(low >= high for low, high in pairwise(uplink.tiers)):
        raise PeerError(f"the tiers {list(uplink.tiers)}; expected them to ascend, to at most {layout.rank}")
    return rank_slices(seed, round_number, layout.rank, uplink.tiers)


def uplink_weight(uplink: Uplink, examples: int, tokens: int) -> int:
    """A client's aggregation weight, 1 to `weight_cap`: its examples, its target tokens, or the cap for all alike."""
    match uplink.weight:
        case "examples":
            return max(1, min(examples, uplink.weight_cap))
        case "tokens":
            return max(1, min(tokens, uplink.weight_cap))
        case "uniform":
            return uplink.weight_cap


def encode_factor(update: Vector, terms: FactorTerms, private_seed: int, weight: float) -> tuple[bytes, Vector]:
    """A client's payload for one factor, and what of the update it carries.

    Args:
        update: float32, (count,), the residual added.
        private_seed: of the ring's stochastic rounding; another for every client, round and factor.
        weight: in (0, 1]; only a ring carries it inside.

    Raises:
        UpdateError: the update holds NaN, infinity or an absurd magnitude.
    """
    match terms.form:
        case "exact":
            return ExactCodec().encode(update), update
        case "sparse":
            codec = SparseCodec(terms.density, terms.bits)
            payload = codec.encode(update)
            return payload, codec.decode(payload, terms.count)
        case "ring":
            contribution, sent = ring_contribution(update, terms, private_seed, weight)
            width = MaskableCodec(terms.bits).ring(terms.context()).width
            body = pack(contribution.words, width) + contribution.auxiliary.astype("<u4").tobytes()
            return frame(Kind.RING, terms.count, body), sent


def ring_contribution(
    update: Vector, terms: FactorTerms, private_seed: int, weight: float
) -> tuple[RingUpdate, Vector]:
    """A client's words and auxiliary sums for one factor, and what of the update they carry; see `encode_factor`."""
    codec, context = MaskableCodec(terms.bits), terms.context()
    contribution = codec.encode(update, weight, private_seed, context)
    return contribution, codec.transmitted(contribution, context)


def decode_factor(payload: bytes, terms: FactorTerms) -> Vector:
    """The update that an "exact" or "sparse" payload carries; float32, (count,), finite.

    Raises:
        PeerError: malformed, with the reason.
    """
    if terms.form == "exact":
        return ExactCodec().decode(payload, terms.count)
    return SparseCodec(terms.density, terms.bits).decode(payload, terms.count)


@dataclass(frozen=True)
class RingSum:
    """Contributions added in a ring, and how many they are."""

    total: RingUpdate
    contributors: int = 0


def ring_zero(terms: FactorTerms) -> RingSum:
    """The empty sum."""
    return RingSum(MaskableCodec(terms.bits).zero(terms.context()))


def add_ring(sum_: RingSum, payload: bytes, terms: FactorTerms) -> RingSum:
    """A sum with one client's "ring" payload.

    Raises:
        PeerError: malformed, with the reason.
    """
    codec, context = MaskableCodec(terms.bits), terms.context()
    width, words = codec.ring(context).width, codec.word_count(context)
    size = packed_size(words, width)
    _, body = unframe(payload, frozenset({Kind.RING}), terms.count, size + _AUXILIARY_BYTES)
    if len(body) != size + _AUXILIARY_BYTES:
        raise PeerError(
            f"payload: {words} words of {width} bits and auxiliary sums take {size + _AUXILIARY_BYTES} bytes"
        )
    contribution = RingUpdate(
        unpack(body[:size], width, words).astype(np.uint32, copy=False),
        np.frombuffer(body[size:], dtype="<u4").astype(np.uint32),
    )
    codec.decode_sum(contribution, 1, context)  # refuses what no single client can have sent
    return RingSum(codec.add(sum_.total, contribution, context), sum_.contributors + 1)


def ring_mean(sum_: RingSum, terms: FactorTerms) -> RingMean:
    """The weighted mean of the contributions.

    Raises:
        PeerError, RunError: it is no sum of that many.
    """
    return MaskableCodec(terms.bits).decode_sum(sum_.total, sum_.contributors, terms.context())
