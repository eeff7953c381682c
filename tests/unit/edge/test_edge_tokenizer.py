"""The tokenizer of an edge pack prepares the examples that transformers' tokenizer prepares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.client.onnx.edge_tokenizer import EdgeTokenizer
from fedtune.core.job.settings import DEMO
from fedtune.data.examples import prepare, start_tokens
from fedtune.data.job_inputs import source_of
from fedtune.data.records import Message, Record
from fedtune.edge.pack_facts import read_facts
from fedtune.model.base_model import load_tokenizer

RECORDS = [
    Record(" the lamp is on", prompt="turn on the lamp"),
    Record("Grüße aus Köln, 你好, emoji 🙂 and a rather long text " * 12),
    Record(" kettle.on", messages=(Message("user", "boil water =>"),)),
    Record(
        " fan.off", messages=(Message("user", "it is cold"), Message("assistant", "oh"), Message("user", "fan off"))
    ),
]


def test_examples_are_those_of_transformers(demo_pack: Path) -> None:
    theirs, ours = load_tokenizer(source_of(DEMO)), of_pack(demo_pack)
    assert start_tokens(theirs) == start_tokens(ours)
    expected, their_report = prepare(RECORDS, theirs, 64)
    found, our_report = prepare(RECORDS, ours, 64)
    assert our_report == their_report
    assert len(found) == len(expected) > len(RECORDS)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert one.first_target == other.first_target


def test_it_renders_text_only(demo_pack: Path) -> None:
    with pytest.raises(ValueError, match="text as its result"):
        of_pack(demo_pack).apply_chat_template([], tokenize=True)


def of_pack(directory: Path) -> EdgeTokenizer:
    return EdgeTokenizer(directory, read_facts(directory))
