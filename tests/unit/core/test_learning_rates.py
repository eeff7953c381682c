"""The default learning rate: by the width of the base, unless the job has its own."""

from __future__ import annotations

import itertools

import pytest

from fedtune.core.adapter.layout import AdaptedModule, AdapterKind
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.learning_rates import LEARNING_RATES, default_learning_rate, width_of, with_learning_rate


def block(width: int, *names: str) -> LoraLayout:
    """Returns the layout of an adapter on some layers of a Llama block."""
    d_in = {"q": width, "k": width, "o": 2 * width, "gate": width, "down": 3 * width}
    return LoraLayout(tuple(AdaptedModule(name, d_in[name], width) for name in names or d_in), 4, 8.0)


@pytest.mark.parametrize(("width", "rate"), [(192, 2e-3), (256, 2e-3), (576, 5e-4), (896, 2e-4), (4096, 2e-4)])
def test_wider_bases_get_smaller_learning_rates(width: int, rate: float) -> None:
    assert default_learning_rate(width, "lora") == rate


@pytest.mark.parametrize("kind", LEARNING_RATES)
def test_a_kinds_row_ascends_in_width_descends_in_rate_and_knows_every_width(kind: AdapterKind) -> None:
    for (width, rate), (wider, smaller) in itertools.pairwise(LEARNING_RATES[kind]):
        assert width < wider
        assert rate > smaller
    assert default_learning_rate(10**9, kind) > 0


@pytest.mark.parametrize("names", [(), ("q",), ("q", "o"), ("gate", "down", "q")])
def test_the_width_does_not_depend_on_which_layers_are_adapted(names: tuple[str, ...]) -> None:
    assert width_of(block(576, *names)) == 576


def test_a_job_keeps_its_own_learning_rate() -> None:
    job = load_job(None, ["training.learning_rate=0.25"])
    assert with_learning_rate(job, block(576)) is job


def test_a_job_without_one_gets_that_of_its_base_and_its_file_says_so() -> None:
    job = load_job(None)
    assert job.training.learning_rate is None
    with pytest.raises(ValueError, match=r"training\.learning_rate is not set"):
        _ = job.training.first_learning_rate
    found = with_learning_rate(job, block(576))
    assert found.training.first_learning_rate == 5e-4
    assert "learning_rate = 0.0005" in dump_job(found)
