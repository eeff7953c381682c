"""The segments of a secure round: the ring words of each factor, and segments of auxiliary sums.

    segments = masked_segments(terms, tiers)                # goes into the round's configuration
    words = masked_words(own_terms, contributions, loss)    # a client's contribution, before its masks
    totals, mean_loss = opened_sums(sums, contributors, terms)      # the unmasked sums, decoded

The auxiliary sums are whole numbers modulo 2^32, each at most 2^16 per client: for each factor the norm of the client's
update, then its training loss. No value of a single client travels in the clear. Under differential privacy there are
none, since each would need noise of its own.

Where devices train different ranks, each slice of a factor is a segment that only its owners carry, and so are its
auxiliary sums. The training loss belongs to the first slice's auxiliary sums, since all clients own that slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.core.codec import MaskableCodec, RingUpdate
from fedtune.core.codec.maskable import AUXILIARY_SUMS
from fedtune.core.codec.ring import AUXILIARY_BITS, AUXILIARY_ONE, auxiliary_total
from fedtune.core.codec.update_forms import RingTotal, ring_codec
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.secagg import Segment
from fedtune.core.secagg.masking import Words

AUXILIARY_NAME = "auxiliary"
MOST_LOSS = 16.0  # nats; a larger training loss counts as this value


def masked_segments(terms: Sequence[FactorTerms], tiers: Sequence[int] = ()) -> tuple[Segment, ...]:
    """Returns one segment for each of the terms, in their order, and one for the auxiliary sums of each slice.

    Args:
        terms: terms of the whole round.
        tiers: tiers of the round, ascending; segments count them from 0. Empty where all clients train all ranks.
    """
    segments = []
    for each in terms:
        codec, context = ring_codec(each), each.context()
        limit = codec.ring(context).levels if isinstance(codec, MaskableCodec) else None
        owners = _owners(each.tier, tiers)
        segments.append(Segment(_name(each), codec.word_count(context), max(codec.width(context), 1), limit, owners))
    if _noised(terms):
        return tuple(segments)
    for place, (tier, part) in enumerate(_slices(terms).items()):
        auxiliary = AUXILIARY_SUMS * len(part) + (place == 0)
        segments.append(Segment(_auxiliary_name(tier), auxiliary, AUXILIARY_BITS, AUXILIARY_ONE, _owners(tier, tiers)))
    return tuple(segments)


def masked_words(terms: Sequence[FactorTerms], contributions: Sequence[RingUpdate], loss: float) -> dict[str, Words]:
    """Returns a client's contribution to each of its segments, before its masks.

    Args:
        terms: terms of the client's tier.
        contributions: one contribution for each of the terms.
        loss: mean training loss in nats, not below 0.
    """
    words: dict[str, Words] = {
        _name(each): contribution.words for each, contribution in zip(terms, contributions, strict=True)
    }
    if _noised(terms):
        return words
    loss_word = round(min(loss, MOST_LOSS) / MOST_LOSS * AUXILIARY_ONE)
    for place, (tier, part) in enumerate(_slices(terms).items()):
        auxiliary = [contributions[index].auxiliary for index in part]
        if place == 0:
            auxiliary.append(np.array([loss_word], dtype=np.uint32))
        words[_auxiliary_name(tier)] = np.concatenate(auxiliary)
    return words


def opened_sums(
    sums: Mapping[str, Words], contributors: Mapping[str, int], terms: Sequence[FactorTerms]
) -> tuple[tuple[RingTotal, ...], float | None]:
    """Returns the summed contributions, one for each of the terms, and the survivors' mean loss where it is summed.

    Args:
        sums: unmasked words by segment.
        contributors: number of clients by segment.

    Raises:
        PeerError: the sum of the losses is out of range.
    """
    if _noised(terms):
        empty = np.zeros(0, dtype=np.uint32)
        words = [(_name(each), sums[_name(each)].astype(np.uint32)) for each in terms]
        return tuple(RingTotal(RingUpdate(given, empty), contributors[name]) for name, given in words), None
    slices = _slices(terms)
    totals: dict[int, RingTotal] = {}
    for tier, part in slices.items():
        auxiliary = sums[_auxiliary_name(tier)].astype(np.uint32)
        for place, index in enumerate(part):
            name = _name(terms[index])
            total = RingUpdate(
                sums[name].astype(np.uint32), auxiliary[AUXILIARY_SUMS * place : AUXILIARY_SUMS * (place + 1)]
            )
            totals[index] = RingTotal(total, contributors[name])
    first = _auxiliary_name(next(iter(slices)))
    losses = auxiliary_total(int(sums[first][-1]), contributors[first]) / contributors[first]
    return tuple(totals[index] for index in range(len(terms))), MOST_LOSS * losses


def _slices(terms: Sequence[FactorTerms]) -> dict[int, list[int]]:
    """Maps the tier of each slice, smallest first, to the indices of the terms that belong to it."""
    slices: dict[int, list[int]] = {}
    for index, each in enumerate(terms):
        slices.setdefault(each.tier, []).append(index)
    return slices


def _noised(terms: Sequence[FactorTerms]) -> bool:
    """Returns whether the round has differential privacy, and so no auxiliary sums."""
    return any(each.rho for each in terms)


def _owners(tier: int, tiers: Sequence[int]) -> tuple[int, ...]:
    """Returns the positions of the tiers that own a slice."""
    return tuple(place for place, other in enumerate(tiers or (0,)) if other >= tier)


def _name(terms: FactorTerms) -> str:
    return f"lora_{terms.factor}.{terms.tier}" if terms.tier else f"lora_{terms.factor}"


def _auxiliary_name(tier: int) -> str:
    return f"{AUXILIARY_NAME}.{tier}" if tier else AUXILIARY_NAME
