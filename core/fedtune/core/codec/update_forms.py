"""The forms in which a client's update of one factor travels up: exact, dense, sparse, or as words of a ring.

    payload = form.encode(update, terms, private_seed)             # on the client
    vector = form.decode(payload, terms)                           # on the server; update - vector is a residual

Payloads of a ring are added first and decoded as a sum:

    total = RING.join(RING.read(first, terms), RING.read(second, terms), terms)
    mean = RING.mean(total, terms)

Server and devices know each form by its name. The server names it in every request; a device that does not know it
refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec.dense import DenseCodec
from fedtune.core.codec.exact import ExactCodec
from fedtune.core.codec.maskable import DecodedSum, MaskableCodec, RingUpdate
from fedtune.core.codec.noised import NoisedCodec
from fedtune.core.codec.packing import pack, packed_size, unpack
from fedtune.core.codec.sparse import SparseCodec
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.codec.wire import Kind, frame, unframe
from fedtune.core.errors import PeerError

_WORD_BYTES = 4  # of an auxiliary sum


class UpdateForm(Protocol):
    """A form of payloads, each of which a server can decode by itself."""

    @property
    def name(self) -> str:
        """The name in jobs and requests."""

    def encode(self, update: Vector, terms: FactorTerms, private_seed: int) -> bytes:
        """Returns a client's payload for one factor.

        Args:
            update: float32, (terms.count,); with error feedback its residual is added.
            terms: terms of the factor in this round.
            private_seed: seed of stochastic rounding, different for every client, round and factor.

        Raises:
            UpdateError: the update holds NaN, infinity or an absurd magnitude.
        """

    def decode(self, payload: bytes, terms: FactorTerms) -> Vector:
        """Returns the update that a payload carries; float32, (terms.count,), finite.

        Raises:
            PeerError: the payload is malformed.
        """


@dataclass(frozen=True)
class ExactForm:
    """Plain float32, without loss."""

    name: ClassVar[str] = "exact"

    def encode(self, update: Vector, terms: FactorTerms, private_seed: int) -> bytes:
        """Returns a payload of four bytes a value."""
        del terms, private_seed
        return ExactCodec().encode(update)

    def decode(self, payload: bytes, terms: FactorTerms) -> Vector:
        """Returns the update, bit for bit."""
        return ExactCodec().decode(payload, terms.count)


@dataclass(frozen=True)
class DenseForm:
    """All values, rounded without bias and entropy-coded."""

    name: ClassVar[str] = "dense"

    def encode(self, update: Vector, terms: FactorTerms, private_seed: int) -> bytes:
        """Returns the payload of all values."""
        return DenseCodec(terms.bits).encode(update, private_seed)

    def decode(self, payload: bytes, terms: FactorTerms) -> Vector:
        """Returns the values, each within half a step of the client's."""
        return DenseCodec(terms.bits).decode(payload, terms.count)


@dataclass(frozen=True)
class SparseForm:
    """The largest values, quantized and entropy-coded."""

    name: ClassVar[str] = "sparse"

    def encode(self, update: Vector, terms: FactorTerms, private_seed: int) -> bytes:
        """Returns the payload of the largest values."""
        del private_seed
        return SparseCodec(terms.density, terms.bits).encode(update)

    def decode(self, payload: bytes, terms: FactorTerms) -> Vector:
        """Returns the values that were sent, zero elsewhere."""
        return SparseCodec(terms.density, terms.bits).decode(payload, terms.count)


@dataclass(frozen=True)
class RingTotal:
    """Contributions added in a ring, and their number."""

    total: RingUpdate
    contributors: int = 0


@dataclass(frozen=True)
class RingForm:
    """Words of a ring, which are added before they are decoded, in the clear or under masks.

    All clients weigh the same.
    """

    name: ClassVar[str] = "ring"

    def encode(self, update: Vector, terms: FactorTerms, private_seed: int) -> bytes:
        """Returns the packed words and the auxiliary sums."""
        contribution = self.contribute(update, terms, private_seed)
        width = ring_codec(terms).width(terms.context())
        body = pack(contribution.words, width) + contribution.auxiliary.astype("<u4").tobytes()
        return frame(Kind.RING, terms.count, body)

    def contribute(self, update: Vector, terms: FactorTerms, private_seed: int) -> RingUpdate:
        """Does as `encode`, but returns words and auxiliary sums as arrays, to which masks can be added."""
        return ring_codec(terms).encode(update, private_seed, terms.context())

    def decode(self, payload: bytes, terms: FactorTerms) -> Vector:
        """Decodes a single payload, as the mean of a sum of one."""
        return self.mean(self.read(payload, terms), terms).update

    def read(self, payload: bytes, terms: FactorTerms) -> RingTotal:
        """Returns one client's payload as a sum of one.

        Raises:
            PeerError: the payload is malformed.
        """
        codec, context = ring_codec(terms), terms.context()
        width, words, auxiliary = codec.width(context), codec.word_count(context), _WORD_BYTES * codec.auxiliary_sums
        size = packed_size(words, width)
        _, body = unframe(payload, frozenset({Kind.RING}), terms.count, size + auxiliary)
        if len(body) != size + auxiliary:
            raise PeerError(f"payload: {words} words of {width} bits and auxiliary sums take {size + auxiliary} bytes")
        contribution = RingUpdate(
            unpack(body[:size], width, words).astype(np.uint32, copy=False),
            np.frombuffer(body[size:], dtype="<u4").astype(np.uint32),
        )
        codec.decode_sum(contribution, 1, context)  # refuses what no single client can have sent
        return RingTotal(contribution, 1)

    def join(self, left: RingTotal, right: RingTotal, terms: FactorTerms) -> RingTotal:
        """Returns the sum of two sums."""
        total = ring_codec(terms).add(left.total, right.total, terms.context())
        return RingTotal(total, left.contributors + right.contributors)

    def mean(self, summed: RingTotal, terms: FactorTerms) -> DecodedSum:
        """Returns the mean of the contributions.

        Raises:
            PeerError, RunError: `summed` cannot be the sum of that many contributions.
        """
        return ring_codec(terms).decode_sum(summed.total, summed.contributors, terms.context())


def ring_codec(terms: FactorTerms) -> MaskableCodec | NoisedCodec:
    """Returns the codec of words that are added before they are decoded, which noises them under privacy."""
    return NoisedCodec(terms.rho, terms.noised) if terms.rho else MaskableCodec(terms.bits)


EXACT, DENSE, SPARSE, RING = ExactForm(), DenseForm(), SparseForm(), RingForm()
FORMS: Mapping[str, UpdateForm] = {form.name: form for form in (EXACT, DENSE, SPARSE, RING)}
