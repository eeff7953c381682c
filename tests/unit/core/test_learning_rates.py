"""The default learning rate: by the width of the base, unless the job has its own."""

from __future__ import annotations

import itertools

import pytest

from fedtune.core.adapter.layout import AdaptedModule, AdapterKind
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.learning_rates import LEARNING_RATES, default_learning_rate, width_of, with_learning_rate
from fedtune.core.job.local_work import Optimizer
from fedtune.core.job.unusual import Surroundings, unusual


def block(width: int, *names: str) -> LoraLayout:
    """Returns the layout of an adapter on some layers of a Llama block."""
    d_in = {"q": width, "k": width, "o": 2 * width, "gate": width, "down": 3 * width}
    return LoraLayout(tuple(AdaptedModule(name, d_in[name], width) for name in names or d_in), 4, 8.0)


@pytest.mark.parametrize(("width", "rate"), [(192, 2e-3), (256, 2e-3), (576, 1e-3), (896, 5e-4), (4096, 2e-4)])
def test_wider_bases_get_smaller_learning_rates(width: int, rate: float) -> None:
    assert default_learning_rate(width, "lora") == rate


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["lora", "core"])
def test_a_row_ascends_in_width_descends_in_rate_and_knows_every_width(kind: AdapterKind, optimizer: Optimizer) -> None:
    for (width, rate), (wider, smaller) in itertools.pairwise(LEARNING_RATES[kind, optimizer]):
        assert width < wider
        assert rate > smaller
    assert default_learning_rate(10**9, kind, optimizer) > 0


def test_a_core_that_adamw_trains_gets_a_smaller_rate_than_by_muon_and_is_judged_by_it() -> None:
    muon, adamw = (default_learning_rate(256, "core", optimizer) for optimizer in ("muon", "adamw"))
    assert muon == default_learning_rate(256, "core") > adamw
    job = load_job(None, ["training.optimizer=adamw", f"training.learning_rate={adamw / 4}"])
    assert unusual(job, Surroundings(width=256)) == []
    assert unusual(load_job(None, [f"training.learning_rate={adamw / 4}"]), Surroundings(width=256))


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
    assert found.training.first_learning_rate == 1e-3
    assert "learning_rate = 0.001" in dump_job(found)
