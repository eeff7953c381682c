"""What a secure round sums means what the same contributions mean when they are added in the open."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import MessageType

from fedtune.core import actions
from fedtune.core.codec import MaskableCodec
from fedtune.core.masked import LANES_NAME, MOST_LOSS, masked_segments, masked_words, opened_sums
from fedtune.core.uplink import FactorTerms, ring_contribution, ring_zero

CLIENTS = 5
TERMS = tuple(FactorTerms("ring", 4, 0.5, count, 1, 3, letter, 0, 0.7, CLIENTS) for letter, count in (("a", 70), ("b", 33)))  # type: ignore[arg-type]  # fmt: skip  # noqa: E501


def test_sums_of_words_are_the_sums_of_contributions() -> None:
    random = np.random.default_rng(0)
    segments = masked_segments(TERMS)
    sums = {segment.name: np.zeros(segment.length, dtype=np.uint64) for segment in segments}
    totals = [ring_zero(terms) for terms in TERMS]
    losses = [0.25, 1.5, 0.0, 3.0, 1e9]
    for client, loss in enumerate(losses):
        updates = [(0.1 * random.standard_normal(terms.count)).astype(np.float32) for terms in TERMS]
        parts = [ring_contribution(update, terms, client, 0.5)[0] for update, terms in zip(updates, TERMS, strict=True)]
        codecs = [(MaskableCodec(terms.bits), terms.context()) for terms in TERMS]
        totals = [codec.add(total, part, context)
                  for (codec, context), total, part in zip(codecs, totals, parts, strict=True)]  # fmt: skip
        words = masked_words(TERMS, parts, loss)
        assert words.keys() == sums.keys()
        for segment in segments:
            assert int(words[segment.name].max()) <= segment.limit
            assert CLIENTS * segment.limit < 1 << segment.bits
            sums[segment.name] += words[segment.name]
    opened, mean_loss = opened_sums(sums, CLIENTS, TERMS)
    for total, each in zip(totals, opened, strict=True):
        assert (total.words == each.words).all()
        assert (total.lanes == each.lanes).all()
    assert mean_loss == pytest.approx((0.25 + 1.5 + 0.0 + 3.0 + MOST_LOSS) / 5, abs=MOST_LOSS / (1 << 16))


def test_a_factor_of_nothing_but_padding_still_has_a_ring() -> None:
    one = FactorTerms("ring", 1, 1.0, 1, 1, 1, "b", 0, 1.0, 1)
    words, lanes = masked_segments([one])
    assert (words.name, words.bits) == ("lora_b", 1)
    assert lanes.name == LANES_NAME


def test_actions_are_flower_s_message_types() -> None:
    assert (MessageType.TRAIN, MessageType.EVALUATE) == (actions.TRAIN, actions.EVALUATE)
    assert actions.query(actions.OPEN) == f"{MessageType.QUERY}.open"
