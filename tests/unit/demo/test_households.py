"""Households, evaluation and files of the demo federation."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.demo import Household, Row, make_evaluation, make_households, write_federation
from fedtune.demo.federated_skills import FEDERATED_SKILLS
from fedtune.demo.households import DEVICES_PER_HOUSEHOLD
from fedtune.demo.skills import SEPARATOR

SEEDS = st.integers(min_value=0, max_value=2**32)


def rows_of(households: list[Household]) -> list[tuple[Row, ...]]:
    return [household.rows for household in households]


@given(seed=SEEDS)
@settings(max_examples=5, deadline=None)
def test_the_same_seed_makes_the_same_households_and_evaluation(seed: int) -> None:
    assert rows_of(make_households(4, seed, 20)) == rows_of(make_households(4, seed, 20))
    assert make_evaluation(30, seed) == make_evaluation(30, seed)


@given(training_seed=SEEDS, evaluation_seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_no_evaluation_prompt_is_ever_a_training_prompt(training_seed: int, evaluation_seed: int) -> None:
    trained = {row["prompt"] for household in make_households(10, training_seed, 200) for row in household.rows}
    assert not any(row["prompt"] in trained for row in make_evaluation(500, evaluation_seed))


def test_a_household_does_not_change_when_others_join() -> None:
    assert rows_of(make_households(3, 7, 20)) == rows_of(make_households(30, 7, 20)[:3])


@pytest.mark.parametrize("count", [10, 1000])
def test_every_skill_is_owned_about_equally_often(count: int) -> None:
    households = make_households(count, seed=0, examples_each=1)
    owners = Counter(device for household in households for device in household.devices)
    assert set(owners) == {skill.name for skill in FEDERATED_SKILLS}
    assert max(owners.values()) - min(owners.values()) <= 2 + count // 50


def test_a_household_asks_only_for_what_its_own_devices_can_do() -> None:
    for household in make_households(20, seed=1, examples_each=60):
        assert len(set(household.devices)) == DEVICES_PER_HOUSEHOLD
        assert {row["skill"] for row in household.rows} == set(household.devices)
        assert all(json.loads(row["completion"])["call"].split(".")[0] == row["skill"] for row in household.rows)


def test_households_repeat_no_prompt_of_their_own_and_differ_from_their_neighbours() -> None:
    households = make_households(10, seed=0)
    for household in households:
        prompts = [row["prompt"] for row in household.rows]
        assert len(set(prompts)) == len(prompts)
    assert all(left.rows != right.rows for left, right in pairwise(households))


def test_every_slot_value_of_a_completion_is_named_in_its_prompt() -> None:
    for row in make_evaluation(500, seed=3):
        assert row["prompt"].endswith(SEPARATOR)
        call = json.loads(row["completion"])
        named = row["prompt"].removesuffix(SEPARATOR).split()
        assert all(str(value) in named for key, value in call.items() if key != "call")


def test_the_written_federation_is_one_file_per_household_and_one_for_evaluation(tmp_path: Path) -> None:
    write_federation(tmp_path, clients=12, seed=5, examples_each=9, evaluation_size=24)
    files = sorted((tmp_path / "clients").iterdir())
    assert [file.name for file in files] == [f"{index:03d}.jsonl" for index in range(12)]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert rows == [list(household.rows) for household in make_households(12, 5, 9)]
    evaluation = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert evaluation == make_evaluation(24, 5)
