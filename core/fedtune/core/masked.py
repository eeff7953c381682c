"""What a secure round sums: the ring words of each factor, and beside them one segment of lanes.

    segments = masked_segments(terms)                       # goes into the round's configuration
    words = masked_words(contributions, loss)               # a client's part: what its masks are added to
    totals, mean_loss = opened_sums(sums, survivors, terms) # what the unmasked sums mean

The lanes are whole numbers modulo 2^32, each at most 2^16 a client: for each factor the client's weight and its
update's norm, then its training loss. Nothing of a single client travels beside them in the clear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.core.codec import MaskableCodec, RingUpdate
from fedtune.core.codec.maskable import LANES
from fedtune.core.codec.ring import LANE_BITS, LANE_ONE, lane_sum
from fedtune.core.secagg import Segment
from fedtune.core.secagg.masks import Words
from fedtune.core.uplink import FactorTerms

EVERYBODY = (0,)  # the one tier, until devices train different ranks
LANES_NAME = "lanes"
MOST_LOSS = 16.0  # nats; a greater training loss counts as this one


def masked_segments(terms: Sequence[FactorTerms]) -> tuple[Segment, ...]:
    """One segment for each factor's words, in the order of the terms, and one for all lanes."""
    segments = []
    for each in terms:
        codec, context = MaskableCodec(each.bits), each.context()
        ring = codec.ring(context)
        name = _name(each)
        segments.append(Segment(name, codec.word_count(context), max(ring.width, 1), ring.levels, EVERYBODY))
    return (*segments, Segment(LANES_NAME, LANES * len(terms) + 1, LANE_BITS, LANE_ONE, EVERYBODY))


def masked_words(terms: Sequence[FactorTerms], contributions: Sequence[RingUpdate], loss: float) -> dict[str, Words]:
    """A client's contribution to every segment, before its masks.

    Args:
        contributions: one for each of the terms.
        loss: mean training loss in nats, not below 0.
    """
    words: dict[str, Words] = {
        _name(each): contribution.words for each, contribution in zip(terms, contributions, strict=True)
    }
    loss_word = round(min(loss, MOST_LOSS) / MOST_LOSS * LANE_ONE)
    lanes = [*(contribution.lanes for contribution in contributions), np.array([loss_word], dtype=np.uint32)]
    return words | {LANES_NAME: np.concatenate(lanes)}


def opened_sums(
    sums: Mapping[str, Words], survivors: int, terms: Sequence[FactorTerms]
) -> tuple[tuple[RingUpdate, ...], float]:
    """The summed contributions, one for each of the terms, and the survivors' mean loss.

    Raises:
        PeerError: no such losses have this sum.
    """
    lanes = sums[LANES_NAME].astype(np.uint32)
    totals = tuple(
        RingUpdate(sums[_name(each)].astype(np.uint32), lanes[LANES * index : LANES * (index + 1)])
        for index, each in enumerate(terms)
    )
    return totals, MOST_LOSS * lane_sum(int(lanes[-1]), survivors) / survivors


def _name(terms: FactorTerms) -> str:
    return f"lora_{terms.factor}"
