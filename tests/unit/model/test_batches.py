"""Steps have every example once an epoch, within the token budget, in an order that follows from the seed."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from fedtune.data.batches import (
    LENGTH_STEP,
    Batch,
    collate,
    concatenate,
    micro_batches,
    row_length,
    row_starts,
    saved_by_concatenating,
    steps_of_epoch,
)
from fedtune.data.examples import Example


def make(lengths: list[int]) -> list[Example]:
    return [
        Example(np.arange(1, length + 1, dtype=np.int32) + 100 * number, 1 + length // 2)
        for number, length in enumerate(lengths)
    ]


def padded_tokens(examples: list[Example]) -> int:
    return collate(examples).ids.size


lengths = st.lists(st.integers(2, 70), min_size=1, max_size=60)


@given(lengths=lengths, budget=st.integers(8, 400), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_example_once_within_the_budget(
    lengths: list[int], budget: int, seed: int, epoch: int
) -> None:
    examples = make(lengths)
    steps = steps_of_epoch(examples, budget, seed, epoch)
    assert sorted(id(example) for step in steps for example in step) == sorted(map(id, examples))
    assert all(len(step) == 1 or padded_tokens(step) <= budget for step in steps)
    again = steps_of_epoch(examples, budget, seed, epoch)
    assert [list(map(id, step)) for step in again] == [list(map(id, step)) for step in steps]


def test_epochs_and_seeds_differ() -> None:
    examples = make([9] * 40)
    orders = [
        [id(example) for step in steps_of_epoch(examples, 64, seed, epoch) for example in step]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_step_is_a_random_sample_and_not_one_of_like_length() -> None:
    examples = make([10] * 200 + [60] * 200)
    mixed = [len({len(example.ids) for example in step}) for step in steps_of_epoch(examples, 512, 0, 0)]
    assert sum(count == 2 for count in mixed) > 0.8 * len(mixed)


def test_examples_of_like_length_share_a_micro_batch_so_little_is_padding() -> None:
    step = make(np.random.default_rng(0).integers(4, 250, 500).tolist())
    real = sum(len(example.ids) for example in step)
    padded = sum(padded_tokens(part) for part in micro_batches(step, 2048))
    assert real / padded > 0.9


@given(lengths=lengths, budget=st.integers(8, 400))
def test_micro_batches_hold_the_whole_step_within_the_budget(lengths: list[int], budget: int) -> None:
    step = make(lengths)
    parts = micro_batches(step, budget)
    assert sorted(id(example) for part in parts for example in part) == sorted(map(id, step))
    assert all(len(part) == 1 or padded_tokens(part) <= budget for part in parts)


def check_targets(batch: Batch, examples: list[Example]) -> None:
    expected = [(row, token) for row, e in enumerate(examples) for token in e.ids[e.first_target :].tolist()]
    assert list(zip(batch.owners.tolist(), batch.targets.tolist(), strict=True)) == expected
    before = [token for e in examples for token in e.ids[e.first_target - 1 : -1].tolist()]
    assert batch.ids.reshape(-1)[batch.positions].tolist() == before


@given(lengths=lengths)
def test_a_batch_points_from_the_token_before_to_each_target(lengths: list[int]) -> None:
    examples = make(lengths)
    batch = collate(examples)
    assert batch.ids.shape[1] % LENGTH_STEP == 0
    check_targets(batch, examples)


@given(lengths=lengths)
def test_a_row_has_every_token_once_and_the_same_targets(lengths: list[int]) -> None:
    examples = make(lengths)
    batch = concatenate(examples)
    tokens = [token for example in examples for token in example.ids.tolist()]
    assert batch.ids.shape == (1, row_length(len(tokens)))
    assert batch.ids[0].tolist() == tokens + [0] * (batch.ids.size - len(tokens))
    assert collate(examples).ids.size == batch.ids.size + saved_by_concatenating(examples)
    check_targets(batch, examples)


@given(groups=st.lists(st.lists(st.integers(2, 40), max_size=5), min_size=1, max_size=4).filter(any))
def test_in_a_row_of_several_clients_each_has_a_stretch_of_its_own(groups: list[list[int]]) -> None:
    clients = [make(own) if own else [] for own in groups]
    starts, stretches = row_starts(groups)
    batch = concatenate(*clients)
    assert stretches == [concatenate(own).ids.size if own else 0 for own in clients]
    first, places = 0, iter(starts)
    for own, stretch in zip(clients, stretches, strict=True):
        if own:
            assert batch.ids[0, first : first + stretch].tolist() == concatenate(own).ids[0].tolist()
            assert [next(places) for _ in own].index(first) == 0
        first += stretch
    check_targets(batch, [example for own in clients for example in own])


@given(st.integers(2, 1 << 20))
def test_a_row_is_little_longer_than_its_tokens_and_there_are_few_lengths(tokens: int) -> None:
    assert tokens <= row_length(tokens) < tokens + max(LENGTH_STEP, tokens / 8)
    assert len({row_length(each) for each in range(4096, 8192)}) <= 9
