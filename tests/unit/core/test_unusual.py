"""Unusual values of a job: each row of the table warns with key, value and usual range, and none about the defaults."""

from __future__ import annotations

import re

import pytest

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.job.unusual import Surroundings, unusual
from fedtune.demo import JOB

SMOLLM2 = Surroundings(width=576, positions=8192, evaluated=400, example_tokens=40.0)


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        ("adapter.kind=lora training.learning_rate=2e-2", r"learning_rate = 0\.02; usual is 0\.0002 to 0\.005 for"),
        ("adapter.kind=lora training.learning_rate=1e-5", r"training\.learning_rate = 1e-05; usual is 0\.0002"),
        ("adapter.rank=512", r"adapter\.rank = 512; usual is 4 to 64"),
        ("training.local_steps=400", r"training\.local_steps = 400; usual is 1 to 100"),
        ("training.batch_tokens=64 data.sequence_length=64", r"batch_tokens = 64; usual is 160 .* 1\.6 examples"),
        ("data.sequence_length=16384 training.batch_tokens=16384", r"sequence_length = 16384; usual is at most 8192"),
        ("data.holdout=0.9", r"data\.holdout = 0\.9; usual is 0 to 0\.5"),
    ],
)  # fmt: skip
def test_an_unusual_value_is_named_with_the_usual_range(override: str, warning: str) -> None:

    (found,) = unusual(load_job(None, override.split()), SMOLLM2)
    assert re.search(warning, found), found


def test_a_tiny_evaluation_set_is_uncertain() -> None:
    (found,) = unusual(Job(), Surroundings(evaluated=25))
    assert found == (
        "unusual: data.evaluation has 25 examples; usual is 50 or more: a share is uncertain by up to 20 points either "
        "way (95%)"
    )


@pytest.mark.parametrize(("cohort", "limit"), [("8", 8), ("0.5", 5), ("40", 10)])
def test_passes_of_more_clients_than_a_round_has_are_unusual(cohort: str, limit: int) -> None:
    job = load_job(None, [f"simulation.together={limit + 1}", f"federation.clients_per_round={cohort}"])
    found = [line for line in unusual(job, Surroundings(clients=10)) if "together" in line]
    assert len(found) == 1
    assert f"usual is at most {limit}, the clients of a round" in found[0]
    job = load_job(None, [f"simulation.together={limit}", f"federation.clients_per_round={cohort}"])
    assert not any("together" in line for line in unusual(job, Surroundings(clients=10)))


@pytest.mark.parametrize("known", [SMOLLM2, Surroundings(), Surroundings(256, 512, 240, 24.0)])
def test_nothing_is_said_about_defaults_and_what_is_not_known(known: Surroundings) -> None:
    assert unusual(Job(), known) == []


def test_the_bundled_demo_is_not_unusual() -> None:
    assert unusual(load_job(JOB), Surroundings(256, 512, 240, 24.0)) == []
