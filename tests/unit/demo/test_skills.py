"""Public and federated skills, and the separation of the latter from pretraining."""

from __future__ import annotations

import random

import pytest

from fedtune.demo.corpus import draw_document
from fedtune.demo.federated_skills import FEDERATED_SKILLS
from fedtune.demo.households import is_held_out
from fedtune.demo.public_skills import PUBLIC_SKILLS
from fedtune.demo.skills import Function

FUNCTIONS = [function for skill in PUBLIC_SKILLS + FEDERATED_SKILLS for function in skill.functions]
FEDERATED = [function for skill in FEDERATED_SKILLS for function in skill.functions]


def test_function_names_are_unique_and_carry_their_skill() -> None:
    names = [function.name for function in FUNCTIONS]
    assert len(set(names)) == len(names)
    for skill in PUBLIC_SKILLS + FEDERATED_SKILLS:
        assert all(function.name.startswith(f"{skill.name}.") for function in skill.functions)


def test_no_federated_function_name_and_no_federated_call_occurs_in_pretraining_text() -> None:
    rng = random.Random(0)
    text = "\n".join(
        f"{document.prompt}{document.completion}" for document in (draw_document(rng) for _ in range(20_000))
    )
    for skill in FEDERATED_SKILLS:
        assert f'"call":"{skill.name}' not in text
    assert not [function.name for function in FEDERATED if function.name in text]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_every_phrasing_names_every_slot(function: Function) -> None:
    for phrasing in function.phrasings:
        assert all(f"{{{slot.key}}}" in phrasing for slot in function.slots)


@pytest.mark.parametrize("function", FEDERATED, ids=lambda function: function.name)
def test_a_request_tells_its_slot_values_apart_whatever_the_phrasing(function: Function) -> None:
    """Two combinations with one request would let a held-out request appear in training."""
    answers: dict[str, str] = {}
    rng = random.Random(function.name)
    for _ in range(1_000):
        indices = function.draw(rng)
        values = function.values_at(indices)
        for phrasing in function.phrasings:
            request = function.request(phrasing, values)
            assert answers.setdefault(request, function.call(values)) == function.call(values)


@pytest.mark.parametrize("function", FEDERATED, ids=lambda function: function.name)
def test_a_fifth_of_the_combinations_is_held_out(function: Function) -> None:
    rng = random.Random(function.name)
    share = sum(is_held_out(function.draw(rng)) for _ in range(2_000)) / 2_000
    assert 0.15 < share < 0.25
