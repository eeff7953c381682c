"""The plan is the first choice that fits; if none fits, the refusal has the numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from fedtune.client.plan.planner import (
    Constraints,
    NoPlanError,
    affordable_rank,
    choose,
    longest_example,
    upload_bytes,
)
from fedtune.client.plan.step_costs import (
    Choices,
    kappa_of,
    operations_per_token,
    predict_memory,
    step_seconds,
)
from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.errors import InputError, ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings, rank_tiers
from fedtune.model.adapted_model import adapter_layout
from fedtune.model.base_model import load_base
from fedtune.model.shape import ModelShape, shape_of

LINEAR = tuple(AdaptedModule(f"layer.{index}", 1024, 1024) for index in range(100))
SHAPE = ModelShape("box", LINEAR, 32_000_000, 12, 1024, 16, 1024, 512, 2048, True, 32_000, 2048, 0)
CONSTRAINTS = Constraints("nf4", "bf16", 16, 512, 512, 4096, 20)
ONE = Choices("dequantized", "bf16", 16, 512, 512, False)
LARGE = 1 << 40


def peak(**changes: Any) -> int:
    return predict_memory(SHAPE, replace(ONE, **changes)).peak


def test_sizes_read_from_the_configuration_are_those_of_the_loaded_model(make_model: Any, architecture: str) -> None:
    settings = ModelSettings(str(make_model(architecture)))
    shape = shape_of(settings)
    base = load_base(settings, precision="fp32", weights="dequantized")
    layout = adapter_layout(base, AdapterSettings(rank=4))
    assert sorted(shape.linear, key=str) == sorted(layout.modules, key=str)
    assert shape.adapter_parameters("lora", 4) == layout.size
    frozen = sum(parameter.numel() for parameter in base.network.parameters())
    assert shape.linear_parameters + shape.other_parameters == frozen
    assert shape.gated == (architecture not in ("gpt2", "gpt_neox"))
    assert shape.file_bytes > 4 * frozen * 0.9


def test_what_is_no_model_has_no_sizes() -> None:
    with pytest.raises(ModelError, match="not a directory"):
        shape_of(ModelSettings("/nowhere"))


def test_with_memory_to_spare_the_plan_is_what_a_simulation_does() -> None:
    plan = choose(SHAPE, replace(CONSTRAINTS, batch_tokens=4000), LARGE)
    assert (plan.choices.weights, plan.choices.checkpointing, plan.sequence_length) == ("dequantized", False, 512)
    assert (plan.choices.tokens, plan.accumulation, plan.tier) == (4000, 1, 16)  # whole steps, not a power of two


def test_less_memory_costs_micro_batch_then_format_then_checkpointing_then_length() -> None:
    budgets = [
        peak(tokens=2048),
        peak(),
        peak(weights="packed"),
        peak(weights="packed", checkpointing=True),
        peak(weights="packed", checkpointing=True, sequence_length=256, tokens=256),
    ]
    assert budgets == sorted(budgets, reverse=True)
    plans = [choose(SHAPE, CONSTRAINTS, budget) for budget in budgets]
    seen = [(p.choices.tokens, p.choices.weights, p.choices.checkpointing, p.sequence_length) for p in plans]
    assert seen == [
        (2048, "dequantized", False, 512),
        (512, "dequantized", False, 512),
        (512, "packed", False, 512),
        (512, "packed", True, 512),
        (256, "packed", True, 256),
    ]
    for plan, budget in zip(plans, budgets, strict=True):
        assert plan.memory.peak <= budget
        assert plan.accumulation * plan.choices.tokens >= CONSTRAINTS.batch_tokens


def test_examples_that_are_all_short_need_less_and_are_cut_no_shorter() -> None:
    short = replace(CONSTRAINTS, longest=40)
    plan = choose(SHAPE, short, peak(sequence_length=40, tokens=40))
    assert (plan.choices.sequence_length, plan.choices.tokens, plan.sequence_length) == (40, 40, 512)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        NoPlanError, match=r"the base model does not fit this device: the smallest plan \(packed.*checkpointed\)"
    ) as caught:
        choose(SHAPE, CONSTRAINTS, 1_000_000)
    assert isinstance(caught.value, InputError)
    needed, allowed = re.findall(r"(\d+) MB", str(caught.value))
    assert (int(needed) > 50, allowed) == (True, "1")


def test_a_job_that_insists_on_a_format_gets_it_or_a_refusal() -> None:
    assert choose(SHAPE, replace(CONSTRAINTS, weights="packed"), LARGE).choices.weights == "packed"
    assert choose(SHAPE, replace(CONSTRAINTS, checkpointing=True), LARGE).choices.checkpointing
    plain = replace(CONSTRAINTS, quantization="none")
    assert choose(SHAPE, plain, peak(checkpointing=True)).choices.checkpointing
    with pytest.raises(NoPlanError):
        choose(SHAPE, plain, peak(weights="packed", checkpointing=True, sequence_length=64, tokens=64))


def test_the_rank_tier_follows_the_line() -> None:
    assert rank_tiers(16) == (4, 8, 16)
    assert rank_tiers(24) == (4, 8, 16, 24)
    assert rank_tiers(2) == (2,)
    assert affordable_rank(SHAPE, CONSTRAINTS) == 16
    slow = replace(CONSTRAINTS, deadline=40.0, bandwidth_up=upload_bytes(SHAPE, 8) / 10)
    assert affordable_rank(SHAPE, slow) == 8
    with pytest.raises(NoPlanError, match=r"sending a rank-4 update takes \d+ s for 761,856 bytes"):
        affordable_rank(SHAPE, replace(slow, bandwidth_up=10.0))


def test_the_longest_example_is_padded_and_at_most_what_the_job_allows() -> None:
    assert longest_example([10, 50, 20], 256) == 56
    assert longest_example([10, 500], 256) == 256
    assert longest_example([], 256) == 256


def test_kappa_makes_the_prediction_what_was_measured() -> None:
    measured = round(1.37 * predict_memory(SHAPE, ONE).training)
    kappa = kappa_of(SHAPE, ONE, measured)
    assert predict_memory(SHAPE, ONE, kappa=kappa).training == pytest.approx(measured, rel=1e-6)
    assert kappa > 1.37  # the weights' size is known and not scaled


def test_prompts_that_the_loss_does_not_count_have_no_logits() -> None:
    whole, part = (predict_memory(SHAPE, ONE, target_share=share) for share in (1.0, 0.25))
    assert whole.working - part.working > 12 * 0.7 * 512 * 32_000


def test_checkpointing_computes_more_and_packing_takes_longer() -> None:
    def seconds(choices: Choices) -> float:
        return step_seconds(SHAPE, choices, 1e11, 4096)

    assert operations_per_token(SHAPE, replace(ONE, checkpointing=True)) > 1.25 * operations_per_token(SHAPE, ONE)
    assert seconds(replace(ONE, weights="packed")) > seconds(ONE)
    assert step_seconds(SHAPE, ONE, 2e11, 4096) == pytest.approx(seconds(ONE) / 2)


def test_a_file_mapped_while_loading_may_be_the_peak() -> None:
    heavy = replace(SHAPE, file_bytes=10**10)
    memory = predict_memory(heavy, ONE)
    assert memory.peak == memory.loading > 10**10
