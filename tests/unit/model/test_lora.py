"""The adapter computes the same as peft's on every architecture, from one flat vector."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fedtune.core.adapter.adapter_files import save_adapter
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.model.adapted_model import AdaptedModel, adapt, adapter_layout
from fedtune.model.base_model import load_base

MakeModel = Callable[..., Path]
ADAPTER = AdapterSettings(rank=4, alpha=8.0)
IDS = torch.tensor([[5, 9, 17, 60, 33, 8], [80, 7, 7, 21, 12, 4]])
LEARNING_RATE = 1e-2
NAMED = AdapterSettings(target_modules=("q_proj", "layers.1.mlp.up_proj"))


def load_adapted(directory: Path, weights: Any = "dequantized", adapter: AdapterSettings = ADAPTER) -> AdaptedModel:
    return adapt(load_base(ModelSettings(str(directory)), weights=weights, precision="fp32"), adapter)


def random_vector(model: AdaptedModel, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal(model.layout.size) * 0.05).astype(np.float32)


def as_peft(model: AdaptedModel, vector: Any, directory: Path, path: Path) -> nn.Module:
    """Makes the same base and adapter with peft alone."""
    base = load_base(ModelSettings(str(directory)), weights="dequantized", precision="fp32")
    save_adapter(path, model.layout, vector, base=str(directory))
    return peft.PeftModel.from_pretrained(base.network, str(path), is_trainable=True)


def next_token_loss(network: nn.Module) -> torch.Tensor:
    logits = network(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("weights", ["packed", "dequantized"])
def test_output_and_an_optimizer_step_are_peft_s(
    make_model: MakeModel, architecture: str, weights: str, tmp_path: Path
) -> None:
    directory = make_model(architecture)
    model = load_adapted(directory, weights)
    vector = random_vector(model)
    reference = as_peft(model, vector, directory, tmp_path)
    model.load(vector)
    with torch.no_grad():
        torch.testing.assert_close(model.base.network(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)

    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == model.layout.size
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    torch.autograd.backward(next_token_loss(reference))
    optimizer.step()

    ours = nn.Parameter(model.parameters)
    ours.grad = model.gradient
    optimizer = torch.optim.AdamW([ours], lr=LEARNING_RATE)
    torch.autograd.backward(next_token_loss(model.base.network))
    optimizer.step()

    state = peft.get_peft_model_state_dict(reference)
    moved = model.layout.pairs(model.vector())
    gradients = model.layout.pairs(model.gradient.numpy())
    for name, factors in moved.items():
        for letter, factor, gradient in zip("AB", factors, gradients[name], strict=True):
            theirs = state[f"base_model.model.{name}.lora_{letter}.weight"].numpy()
            # Adam divides by the gradient's size, so the step is rounding error wherever the gradient is.
            certain = np.abs(gradient) > 1e-6
            np.testing.assert_allclose(factor[certain], theirs[certain], rtol=1e-3, atol=LEARNING_RATE * 0.01)


def test_a_saved_adapter_is_one_that_peft_loads_on_the_original_model(
    make_model: MakeModel, architecture: str, tmp_path: Path
) -> None:
    directory = make_model(architecture)
    base = load_base(ModelSettings(str(directory), quantization="none"), precision="fp32")
    model = adapt(base, ADAPTER)
    vector = random_vector(model)
    model.load(vector)
    save_adapter(tmp_path, model.layout, vector, base=str(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about layers that GPT-2 stores transposed
        original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(original, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model.base.network(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_all_linear_adapts_what_peft_s_all_linear_adapts(make_model: MakeModel, architecture: str) -> None:
    directory = make_model(architecture)
    layout = adapter_layout(load_base(ModelSettings(str(directory)), precision="fp32"), ADAPTER)
    network = load_base(ModelSettings(str(directory)), precision="fp32", weights="dequantized").network
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(network, config).targeted_module_names
    assert {module.name for module in layout.modules} == set(theirs)


def test_a_vector_goes_in_and_comes_out(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    vector = random_vector(model)
    model.load(vector)
    assert np.array_equal(model.vector(), vector)
    model.vector()[:] = 0
    assert np.array_equal(model.vector(), vector)


def test_swapping_adapters_leaves_nothing_of_the_one_before(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    first, second = random_vector(model, 1), random_vector(model, 2)
    with torch.no_grad():
        model.load(first)
        before = model.base.network(IDS).logits
        model.load(second)
        assert not torch.equal(model.base.network(IDS).logits, before)
        model.load(first)
        assert torch.equal(model.base.network(IDS).logits, before)


def test_a_fresh_adapter_changes_nothing(make_model: MakeModel, architecture: str) -> None:
    base = load_base(ModelSettings(str(make_model(architecture))), precision="fp32")
    with torch.no_grad():
        before = base.network(IDS).logits
        model = adapt(base, ADAPTER)
        model.load(model.layout.initial(7))
        torch.testing.assert_close(base.network(IDS).logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("factors", "frozen"), [("a", "b"), ("b", "a")])
def test_no_gradient_reaches_a_frozen_factor(make_model: MakeModel, factors: Any, frozen: Any) -> None:
    model = load_adapted(make_model("llama"))
    model.load(random_vector(model))
    model.train_factors(factors)
    torch.autograd.backward(next_token_loss(model.base.network))
    assert model.gradient[model.layout.segment(factors)].abs().sum() > 0
    assert model.gradient[model.layout.segment(frozen)].abs().sum() == 0


def test_a_factor_s_gradient_is_the_same_whether_the_other_is_frozen(make_model: MakeModel) -> None:
    model = load_adapted(make_model("llama"))
    model.load(random_vector(model))
    gradients: dict[str, torch.Tensor] = {}
    for factors in ("ab", "a", "b"):
        model.gradient.zero_()
        model.train_factors(factors)
        torch.autograd.backward(next_token_loss(model.base.network))
        gradients[factors] = model.gradient.clone()
    assert torch.equal(gradients["ab"], gradients["a"] + gradients["b"])


def test_named_targets_adapt_only_the_modules_that_end_so(make_model: MakeModel) -> None:
    model = load_adapted(
        make_model("llama"), adapter=AdapterSettings(target_modules=("q_proj", "layers.1.mlp.up_proj"))
    )
    names = {module.name.removeprefix("model.layers.") for module in model.layout.modules}
    assert names == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}


def test_the_fused_projection_of_phi3_and_gpt_neox_is_one_module(make_model: MakeModel) -> None:
    for architecture, fused in (("phi3", "qkv_proj"), ("gpt_neox", "query_key_value")):
        model = load_adapted(make_model(architecture), adapter=AdapterSettings(target_modules=(fused,)))
        assert len(model.layout.modules) == 2


@pytest.mark.parametrize("targets", [["nonsense"], ["q_proj", "proj"], ["lm_head"], ["embed_tokens"]])
def test_a_target_that_matches_nothing_lists_what_there_is(make_model: MakeModel, targets: list[str]) -> None:
    with pytest.raises(ModelError, match=r"matches no linear layer.*q_proj, k_proj, v_proj, o_proj") as raised:
        load_adapted(make_model("llama"), adapter=AdapterSettings(target_modules=tuple(targets)))
    assert targets[-1] in str(raised.value)
    assert "adapter.target_modules: q_proj" not in str(raised.value)


@pytest.mark.parametrize("kind", ["lora", "core"])
@pytest.mark.parametrize("weights", ["packed", "dequantized"])
def test_an_adapted_layer_takes_no_tokens_at_all(make_model: MakeModel, kind: Any, weights: str) -> None:
    """As an expert that no token was sent to."""
    model = load_adapted(make_model("llama"), weights, AdapterSettings(kind, rank=4))
    layer: Any = model.base.network.get_submodule(model.layout.modules[-1].name)
    none = torch.zeros(0, model.layout.modules[-1].d_in, requires_grad=True)
    output = layer(none)
    torch.autograd.backward(output, torch.zeros_like(output))
    assert output.shape == (0, model.layout.modules[-1].d_out)
    assert none.grad is not None
    assert none.grad.shape == none.shape


class Doubling(nn.Linear):
    """A linear layer of an architecture's own, as a mixture's router is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A linear layer in other words, as Falcon's is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_a_layer_that_computes_something_else_with_its_weight_is_refused_by_name(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_model("llama")
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    kind: type[nn.Linear] = Plain

    def load(source: str, **options: Any) -> Any:
        network, report = from_pretrained(source, **options)
        network.model.layers[1].mlp.gate_proj.__class__ = kind
        return network, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    whole = ModelSettings(str(directory), "none")
    assert adapt(load_base(whole, precision="fp32"), ADAPTER).layout.size == load_adapted(directory).layout.size
    kind = Doubling
    for refused in (lambda: load_base(ModelSettings(str(directory))), lambda: adapt(load_base(whole), ADAPTER)):
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj is a Doubling, which is no plain"):
            refused()
    adapt(load_base(whole), NAMED)


def test_bf16_is_within_rounding_of_float32(make_model: MakeModel, architecture: str) -> None:
    directory = make_model(architecture)
    outputs, gradients = [], []
    for precision in ("fp32", "bf16"):
        model = adapt(load_base(ModelSettings(str(directory)), precision=precision), ADAPTER)
        model.load(random_vector(model))
        loss = next_token_loss(model.base.network)
        torch.autograd.backward(loss)
        outputs.append(loss.detach().float())
        gradients.append(model.gradient)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=0)
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99
