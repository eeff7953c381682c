"""In a balanced epoch, classes appear equally often, as far as no example is repeated too often."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fedtune.client.local_steps import StepSums, local_steps, result_of
from fedtune.client.trainer import LocalTask
from fedtune.core.errors import DataError
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import DataSettings
from fedtune.data.balance import MOST_REPEATS, balanced_epoch, quotas
from fedtune.data.examples import Example, hold_out, load_examples
from fedtune.data.population import Population
from fedtune.data.records import read_records

SKEWED = ["frequent"] * 12 + ["rare"] * 4
several = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def examples(*counts: int) -> list[Example]:
    """Returns so many examples of each class, in the order of their classes."""
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    return [Example(np.arange(4, dtype=np.int32), 2, label) for label in labels]


def write(path: Path, kinds: list[str]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"lamp {number}", "completion": "on", "kind": kind}) + "\n"
            for number, kind in enumerate(kinds)
        )
    )
    return path


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([10, 10], [10, 10]),
        ([12, 4], [8, 8]),
        ([12, 1], [9, 4]),  # four times the one, and the rest
        ([14, 6, 1], [9, 8, 4]),
        ([7], [7]),
        ([1, 1, 1], [1, 1, 1]),
    ],
)
def test_classes_have_equal_quotas_up_to_four_times_their_examples(counts: list[int], expected: list[int]) -> None:
    assert list(dict(sorted(quotas(dict(enumerate(counts))).items())).values()) == expected


@settings(deadline=None)
@given(counts=several, seed=st.integers(0, 1 << 62), epoch=st.integers(0, 5))
def test_an_epoch_keeps_its_size_and_the_classes_their_quotas_and_repeats_none_too_often(
    counts: list[int], seed: int, epoch: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    drawn = balanced_epoch(labels.tolist(), seed, epoch)
    assert len(drawn) == len(labels)
    assert Counter(labels[drawn].tolist()) == quotas(dict(enumerate(counts)))
    times = np.bincount(drawn, minlength=len(labels))
    assert times.max() <= MOST_REPEATS
    assert all(np.ptp(times[labels == label]) <= 1 for label in range(len(counts)))
    assert np.array_equal(drawn, balanced_epoch(labels.tolist(), seed, epoch))


def test_one_class_has_every_example_once() -> None:
    assert balanced_epoch([0] * 9, 3, 1).tolist() == list(range(9))


def test_epochs_and_seeds_draw_other_examples_of_a_frequent_class() -> None:
    labels = [0] * 60 + [1] * 20
    drawn = [balanced_epoch(labels, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_local_steps_are_balanced_and_the_counts_of_a_reply_are_those_of_the_records() -> None:
    own = examples(12, 4)
    work = local_work(TrainingSettings(local_epochs=2.0, batch_tokens=8, learning_rate=1e-3))
    steps = list(local_steps(own, LocalTask(5, work)))
    assert Counter(example.label for step in steps for example in step) == {0: 16, 1: 16}
    result = result_of(np.zeros(1, dtype=np.float32), own, [StepSums(1.0, 2, 8)], 0.0)
    assert (result.examples, result.target_tokens) == (16, 32)


def test_the_classes_of_examples_are_the_values_of_the_field_and_one_without_balance(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    path, tokenizer = write(tmp_path / "mine.jsonl", SKEWED), make_tokenizer()
    balanced, report = load_examples(path, tokenizer, 64, balance="kind")
    plain, _ = load_examples(path, tokenizer, 64)
    assert [example.label for example in balanced] == [0] * 12 + [1] * 4
    assert {example.label for example in plain} == {0}
    assert report.kept == len(plain)
    held, also_held = (hold_out(each, 0.25, 7)[1] for each in (balanced, plain))
    assert [example.ids.tolist() for example in held] == [example.ids.tolist() for example in also_held]


def test_a_record_without_the_field_is_refused_with_its_line_and_the_remedy(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.jsonl", SKEWED)
    path.write_text(path.read_text() + '\n{"prompt": "a", "completion": "b", "level": 3}\n')
    expected = r'mine\.jsonl:18: .*"kind".*no such field, only "level"; add it to every record.*data\.balance'
    with pytest.raises(DataError, match=expected):
        load_examples(path, make_tokenizer(), 64, skip_bad=True, balance="kind")
    for partition in ("by-file", "iid"):
        data = DataSettings(train=str(path), partition=partition, clients=2, balance="kind")
        with pytest.raises(DataError, match=expected):
            Population(data, 0)
        assert Population(replace(data, balance=None), 0).names
    assert [record.line for record in read_records(path)[0]][-2:] == [16, 18]


def test_the_demos_households_balance_by_skill_and_nothing_else() -> None:
    assert Population(DataSettings(clients=2, balance="skill"), 0).records("000")[0].fields["skill"]
    with pytest.raises(DataError, match='no such field, only "skill"'):
        Population(DataSettings(clients=2, balance="category"), 0)
