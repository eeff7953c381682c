"""The sums of a secure round decode to the same values as the same contributions summed in the clear."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.core.codec import MaskableCodec, RingUpdate
from fedtune.core.codec.masked import AUXILIARY_NAME, MOST_LOSS, masked_segments, masked_words, opened_sums
from fedtune.core.codec.update_forms import RING, RingTotal
from fedtune.core.codec.uplink import FactorTerms, Part
from fedtune.core.protocol.messages import Uplink

CLIENTS = 5


def ring(bits: int, n_max: int) -> Uplink:
    return Uplink("ring", bits, 1.0, False, n_max, (1.0,), True)


TERMS = tuple(
    FactorTerms(ring(4, CLIENTS), 1, 3, letter, count, 0.7)  # type: ignore[arg-type]
    for letter, count in (("a", 70), ("b", 33))
)


def add_parts(summed: RingTotal, part: RingUpdate, terms: FactorTerms) -> RingTotal:
    return RingTotal(MaskableCodec(terms.bits).add(summed.total, part, terms.context()), summed.contributors + 1)


def test_sums_of_words_are_the_sums_of_contributions() -> None:
    random = np.random.default_rng(0)
    segments = masked_segments(TERMS)
    sums = {segment.name: np.zeros(segment.length, dtype=np.uint64) for segment in segments}
    totals = [RingTotal(MaskableCodec(terms.bits).zero(terms.context())) for terms in TERMS]
    losses = [0.25, 1.5, 0.0, 3.0, 1e9]
    for client, loss in enumerate(losses):
        updates = [(0.1 * random.standard_normal(terms.count)).astype(np.float32) for terms in TERMS]
        parts = [RING.contribute(update, terms, client) for update, terms in zip(updates, TERMS, strict=True)]
        totals = [add_parts(total, part, terms) for total, part, terms in zip(totals, parts, TERMS, strict=True)]
        words = masked_words(TERMS, parts, loss)
        assert words.keys() == sums.keys()
        for segment in segments:
            assert segment.limit is not None
            assert int(words[segment.name].max()) <= segment.limit
            assert CLIENTS * segment.limit < 1 << segment.bits
            sums[segment.name] += words[segment.name]
    opened, mean_loss = opened_sums(sums, dict.fromkeys(sums, CLIENTS), TERMS)
    for summed, each in zip(totals, opened, strict=True):
        assert summed.contributors == each.contributors == CLIENTS
        assert (summed.total.words == each.total.words).all()
        assert (summed.total.auxiliary == each.total.auxiliary).all()
    assert mean_loss == pytest.approx((0.25 + 1.5 + 0.0 + 3.0 + MOST_LOSS) / 5, abs=MOST_LOSS / (1 << 16))


def test_every_slice_of_mixed_ranks_is_a_segment_of_its_owners_with_auxiliary_sums_of_its_own() -> None:
    parts = {4: Part(4, np.arange(0, 20), 70), 16: Part(16, np.arange(20, 70), 70)}
    terms = [FactorTerms(ring(4, CLIENTS), 1, 3, letter, len(part.indices), 0.7, part)  # type: ignore[arg-type]
             for letter in "ab" for part in parts.values()]  # fmt: skip
    segments = masked_segments(terms, (4, 16))
    assert [(segment.name, segment.tiers) for segment in segments] == [
        ("lora_a.4", (0, 1)), ("lora_a.16", (1,)), ("lora_b.4", (0, 1)), ("lora_b.16", (1,)),
        ("auxiliary.4", (0, 1)), ("auxiliary.16", (1,)),
    ]  # fmt: skip
    assert [segment.length for segment in segments[-2:]] == [3, 2]  # only the first has the loss
    small = [each for each in terms if each.tier == 4]
    contributions = [RING.contribute(np.ones(each.count, dtype=np.float32), each, 1) for each in small]
    words = masked_words(small, contributions, 0.5)
    assert {name: len(values) for name, values in words.items()} == {
        segment.name: segment.length for segment in segments if 0 in segment.tiers
    }


def test_a_factor_of_nothing_but_padding_still_has_a_ring() -> None:
    one = FactorTerms(ring(1, 1), 1, 1, "b", 1, 1.0)
    words, auxiliary = masked_segments([one])
    assert (words.name, words.bits) == ("lora_b", 1)
    assert auxiliary.name == AUXILIARY_NAME
