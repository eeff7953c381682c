"""The graphs of an edge pack compute torch's losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client.onnx.edge_network import EdgeNetwork
from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import Vector
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.batches import Batch, collate
from fedtune.data.examples import Example
from fedtune.edge.pack import UnpackedBlocks, open_pack
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import linear_modules, load_base
from fedtune.model.loss import completion_loss, on_device, score
from fedtune.model.packed import PackedLinear

MakeModel = Callable[..., Path]
PackOf = Callable[[str], Path]
LORA = AdapterSettings(rank=4, alpha=8.0)
CORE = AdapterSettings(kind="core", rank=4, alpha=8.0)
ODD = {"hidden_size": 40, "head_dim": 10, "intermediate_size": 37}  # no whole number of NF4 blocks
TOLERANCE = 1e-5  # relative to the largest gradient, in float32


def torch_model(directory: Path, settings: AdapterSettings) -> AdaptedModel:
    return adapt(load_base(ModelSettings(str(directory)), precision="fp32", weights="packed"), settings)


def batch_of(*lengths: int) -> Batch:
    random = np.random.default_rng(7)
    return collate([Example(random.integers(3, 300, length, dtype=np.int32), length // 2) for length in lengths])


def random_vector(size: int) -> Vector:
    return (np.random.default_rng(0).standard_normal(size) * 0.1).astype(np.float32)


def torch_gradient(model: AdaptedModel, batch: Batch, scale: float) -> tuple[float, Vector]:
    model.gradient.zero_()
    loss = completion_loss(model.lm_head, on_device(batch, model.base.device))
    torch.autograd.backward(loss * scale)
    return float(loss.detach()), model.gradient.numpy().copy()


def distance(ours: Any, theirs: Any) -> float:
    """Returns the largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", ODD),
        pytest.param("qwen2", {}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("mistral", {"sliding_window": 12}, marks=pytest.mark.slow),
        pytest.param("gemma", {}, marks=pytest.mark.slow),
        pytest.param("phi3", {}, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_torch_s(
    make_biased: MakeModel, pack_of: PackOf, architecture: str, options: dict[str, Any]
) -> None:
    directory = make_biased(architecture, **options)
    pack = open_pack(pack_of(str(directory)))
    assert pack.facts.architecture == architecture
    for settings in (LORA, CORE):
        model = torch_model(directory, settings)
        network = EdgeNetwork(pack, pack.layout(settings), unpacked=settings is CORE)
        vector = random_vector(model.layout.size)
        model.load(vector)
        network.load(vector)
        for batch in (batch_of(30), batch_of(9, 17, 40), batch_of(2, 2)):
            loss, gradient = torch_gradient(model, batch, 1 / 8)
            found = np.zeros_like(vector)
            assert network.add_gradient(batch, 1 / 8, model.layout.factors, found) == pytest.approx(loss, rel=1e-5)
            assert distance(found, gradient) < TOLERANCE
            again = np.zeros_like(vector)
            network.add_gradient(batch, 1 / 8, model.layout.factors, again, checkpointing=True)
            assert np.array_equal(again, found)
            losses, right = score(model.lm_head, on_device(batch, model.base.device))
            our_losses, our_right = network.score(batch)
            np.testing.assert_allclose(our_losses, losses.numpy(), rtol=1e-5, atol=1e-5)
            assert np.array_equal(our_right, right.numpy())


@pytest.mark.parametrize("settings", [LORA, CORE], ids=["lora", "core"])
def test_the_layout_is_torch_s_with_the_same_fixed_factors(
    make_biased: MakeModel, pack_of: PackOf, settings: AdapterSettings
) -> None:
    directory = make_biased("llama", **ODD)
    theirs = torch_model(directory, settings).layout
    ours = open_pack(pack_of(str(directory))).layout(settings)
    assert ours == theirs
    assert ours.fixed_digest == theirs.fixed_digest
    assert isinstance(ours, CoreLayout) == bool(ours.fixed_digest)


def test_unpacked_weights_are_torch_s_to_the_bit(make_biased: MakeModel, pack_of: PackOf) -> None:
    directory = make_biased("llama", **ODD)
    pack = open_pack(pack_of(str(directory)))
    layers = dict(linear_modules(torch_model(directory, LORA).base.network))
    originals = {name.removesuffix(".base_layer"): layer for name, layer in layers.items()}
    for module in pack.facts.shape.linear:
        layer = originals[module.name]
        assert isinstance(layer, PackedLinear)
        assert np.array_equal(pack.weight(module), layer.dense().numpy())


@pytest.mark.parametrize("keep", [False, True])
def test_threads_unpack_the_block_that_was_asked_for(make_biased: MakeModel, pack_of: PackOf, keep: bool) -> None:
    pack = open_pack(pack_of(str(make_biased("llama", **ODD))))
    unpacked = UnpackedBlocks(pack, threads=3, keep=keep)
    for _ in range(5):
        for layer in (1, 0):
            prefix = f"{pack.facts.blocks}.{layer}."
            modules = [module for module in pack.facts.shape.linear if module.name.startswith(prefix)]
            found = unpacked.weights(layer)
            assert modules
            for module in modules:
                assert np.array_equal(found[f"{module.name.removeprefix(prefix)}.weight"], pack.weight(module))


def test_only_the_factors_and_modules_that_are_asked_for_get_gradients(make_biased: MakeModel, pack_of: PackOf) -> None:
    settings = AdapterSettings(rank=3, target_modules=("q_proj", "down_proj"))
    directory = make_biased("llama", **ODD)
    model = torch_model(directory, settings)
    pack = open_pack(pack_of(str(directory)))
    network = EdgeNetwork(pack, pack.layout(settings))
    vector, batch = random_vector(model.layout.size), batch_of(10, 24)
    model.load(vector)
    network.load(vector)
    _, gradient = torch_gradient(model, batch, 1.0)
    for factors in ("a", "b"):
        found = np.zeros_like(vector)
        network.add_gradient(batch, 1.0, factors, found)
        segment = model.layout.segment(factors)
        assert distance(found[segment], gradient[segment]) < TOLERANCE
        assert np.count_nonzero(found) == np.count_nonzero(found[segment])
