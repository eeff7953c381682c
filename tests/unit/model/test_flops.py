"""The operations that are counted from sizes are those that torch counts in a real step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedtune.core.adapter.layout import Factors
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.batches import collate
from fedtune.data.examples import Example
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.flops import ExampleLengths, Flops
from fedtune.model.loss import on_device, score
from fedtune.model.shape import shape_of

MakeModel = Callable[..., Path]
LENGTH, FIRST_TARGET, EXAMPLES = 32, 20, 6
LENGTHS = ExampleLengths(LENGTH, LENGTH - FIRST_TARGET)


def adapted(directory: Path, settings: AdapterSettings) -> tuple[AdaptedModel, Flops]:
    chosen = ModelSettings(str(directory), "none")
    base = load_base(chosen, precision="fp32")
    base.network.set_attn_implementation("eager")  # torch counts its products like any others
    model = adapt(base, settings)
    model.load((np.random.default_rng(0).standard_normal(model.layout.size) * 0.05).astype(np.float32))
    return model, Flops.of(shape_of(chosen), settings)


def batch() -> Any:
    random = np.random.default_rng(1)
    rows = [Example(random.integers(3, 250, LENGTH).astype(np.int32), FIRST_TARGET) for _ in range(EXAMPLES)]
    return on_device(collate(rows), torch.device("cpu"))


def torch_counts(compute: Callable[[], object]) -> int:
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}  # torch omits it
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "factors"), [("lora", "ab"), ("lora", "b"), ("core", "r")], ids=["lora", "b alone", "core"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_training_step_has_the_operations_that_torch_counts(
    make_model: MakeModel, architecture: str, kind: Any, factors: Factors
) -> None:
    model, flops = adapted(make_model(architecture, num_key_value_heads=4), AdapterSettings(kind, 4))
    model.train_factors(factors)
    head, rows = model.lm_head, batch()  # the head's self-check computes, too

    def step() -> None:
        # In one piece: torch's counter does not see through the chunked loss, whose products are the same.
        logits = head.logits(head.hidden(rows))
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, rows.targets))

    assert EXAMPLES * flops.trained(LENGTHS, factors) == pytest.approx(torch_counts(step), rel=0.01)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_evaluation_has_the_operations_that_torch_counts(make_model: MakeModel, architecture: str) -> None:
    model, flops = adapted(make_model(architecture), AdapterSettings("core", 8))
    model.lm_head  # noqa: B018
    counted = torch_counts(lambda: score(model.lm_head, batch()))
    assert EXAMPLES * flops.scored(LENGTHS) == pytest.approx(counted, rel=0.01)


def test_only_chosen_layers_have_an_adapter(make_model: MakeModel) -> None:
    settings = AdapterSettings("lora", 8, target_modules=("q_proj",))
    model, flops = adapted(make_model("llama"), settings)
    model.lm_head  # noqa: B018
    counted = torch_counts(lambda: score(model.lm_head, batch()))
    assert EXAMPLES * flops.scored(LENGTHS) == pytest.approx(counted, rel=0.01)


def test_checkpointing_adds_a_forward_pass_without_the_head(make_model: MakeModel) -> None:
    _, flops = adapted(make_model("llama"), AdapterSettings("core", 8))
    again = flops.trained(LENGTHS, "r", recomputed=True) - flops.trained(LENGTHS, "r")
    assert again == pytest.approx(flops.scored(replace(LENGTHS, targets=0.0)))
