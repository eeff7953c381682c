"""Held-out examples against training examples: other forms, labels and categories are said, with the remedy."""

from __future__ import annotations

import pytest

from fedtune.core.job.job_file import load_job
from fedtune.data.evaluation_match import mismatches
from fedtune.data.job_inputs import JobInputs
from fedtune.data.records import Message, Record
from fedtune.demo import JOB

LABELS = ("noun.animal", "noun.plant", "verb.motion")
TRAINING = [Record(f" {LABELS[n % 3]}", f"word {n}: ", fields={"topic": LABELS[n % 3][:4]}) for n in range(60)]
REMEDY = "take held-out examples from the same source as data.train, or change data.evaluation"


def test_the_same_kind_of_records_is_not_worth_a_word() -> None:
    assert mismatches(TRAINING, TRAINING[:7]) == []
    assert mismatches(TRAINING, []) == []
    assert mismatches([], TRAINING) == []


def test_another_form_is_said() -> None:
    chat = [Record("noun.plant", messages=(Message("user", "fern"),), fields={"topic": "noun"})] * 3
    (found,) = mismatches(TRAINING, chat)
    assert found == (
        f"data.evaluation: 3 of 3 records are conversations, and training has only prompts with completions; {REMEDY}"
    )


def test_a_label_that_training_never_has_is_said_and_a_category_too() -> None:
    strange = [Record(" adj.all", "blue: ", fields={"topic": "adj"})] * 4
    completions, topics = mismatches(TRAINING, [*TRAINING[:12], *strange])
    problem = 'data.evaluation: 4 of 16 records have completions that training never has, such as "adj.all"'
    assert completions == f"{problem}; {REMEDY}"
    assert 'have values of "topic" that training never has, such as "adj"' in topics


def test_a_rare_label_in_a_small_set_of_the_same_source_is_not_worth_a_word() -> None:
    rare = [Record(" noun.shape", "round: ", fields={"topic": "noun"})] * 2
    assert mismatches(TRAINING, [*TRAINING[:38], *rare]) == []
    assert len(mismatches(TRAINING, [*TRAINING[:35], *rare, *rare, *rare])) == 1


def test_a_field_that_repeats_the_completion_is_said_once() -> None:
    training = [Record(f" {label}", "word: ", fields={"label": label}) for label in LABELS * 20]
    strange = [Record(" adj.all", "blue: ", fields={"label": "adj.all"})] * 8
    assert len(mismatches(training, strange)) == 1


def test_free_text_may_say_anything() -> None:
    training = [Record(f"an answer of its own, number {n}", "why? ") for n in range(60)]
    assert mismatches(training, [Record("another answer", "why? ")] * 5) == []


@pytest.mark.parametrize("overrides", [[], ["data.clients=4", "data.examples_per_client=12"], ["data.clients=60"]])
def test_the_bundled_demo_is_evaluated_on_its_own_task(overrides: list[str]) -> None:
    inputs = JobInputs(load_job(JOB, overrides))
    assert mismatches(inputs.population.sample(), inputs.evaluation) == []


def test_a_sample_of_many_clients_is_spread_over_them() -> None:
    population = JobInputs(load_job(None, ["data.clients=30", "data.examples_per_client=3"])).population
    assert len(population.sample()) == 90
    assert population.sample(10) == [record for name in population.names[::3] for record in population.records(name)]
