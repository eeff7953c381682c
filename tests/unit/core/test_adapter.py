"""The flat adapter vector, its layout, and the files that peft reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.core.adapter.adapter_files import load_adapter, save_adapter
from fedtune.core.adapter.layout import AdaptedModule, adapter_digest
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.errors import ModelError

LAYOUT = LoraLayout((AdaptedModule("layers.0.q", 6, 4), AdaptedModule("layers.0.up", 4, 10)), rank=2, alpha=8.0)


def test_every_number_of_the_vector_belongs_to_exactly_one_factor() -> None:
    vector = np.arange(LAYOUT.size, dtype=np.float32)
    parts = [factor.ravel() for pair in LAYOUT.pairs(vector).values() for factor in pair]
    assert sorted(np.concatenate(parts)) == list(range(LAYOUT.size))
    assert LAYOUT.size == 2 * (6 + 4) + 2 * (4 + 10)


def test_each_factor_has_one_contiguous_segment() -> None:
    vector = np.zeros(LAYOUT.size, dtype=np.float32)
    vector[LAYOUT.segment("a")] = 1
    for lora_a, lora_b in LAYOUT.pairs(vector).values():
        assert (lora_a == 1).all()
        assert (lora_b == 0).all()


def test_the_initial_adapter_changes_nothing_and_follows_from_the_seed() -> None:
    vector = LAYOUT.initial(7)
    assert (vector[LAYOUT.segment("b")] == 0).all()
    assert (vector[LAYOUT.segment("a")] != 0).all()
    for module, (lora_a, _) in zip(LAYOUT.modules, LAYOUT.pairs(vector).values(), strict=True):
        assert np.abs(lora_a).max() <= module.d_in**-0.5
    assert adapter_digest(vector) == adapter_digest(LAYOUT.initial(7)) != adapter_digest(LAYOUT.initial(8))


def test_scaling_is_rank_stabilised() -> None:
    assert LAYOUT.scaling == pytest.approx(8 / 2**0.5)


def test_a_saved_adapter_reads_back_bit_for_bit(tmp_path: Path) -> None:
    vector = np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32)
    save_adapter(tmp_path, LAYOUT, vector, "base")
    assert adapter_digest(load_adapter(tmp_path, LAYOUT)) == adapter_digest(vector)


def test_all_differences_from_the_layout_are_listed_at_once(tmp_path: Path) -> None:
    save_adapter(tmp_path, LAYOUT, LAYOUT.initial(0), "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.other.lora_A.weight"] = tensors.pop("base_model.model.layers.0.q.lora_A.weight")
    tensors["base_model.model.layers.0.up.lora_B.weight"] = np.zeros((3, 2), dtype=np.float32)
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        load_adapter(tmp_path, LAYOUT)
    for part in (
        "layers.0.q.lora_A.weight is missing",
        "has shape (3, 2); expected (10, 2)",
        "other.lora_A.weight is not",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_a_broken_adapter_file_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not a readable adapter"):
        load_adapter(tmp_path, LAYOUT)


def test_a_vector_of_the_wrong_size_or_type_is_refused() -> None:
    with pytest.raises(ModelError, match="expected float32"):
        LAYOUT.pairs(np.zeros(LAYOUT.size, dtype=np.float64))
    with pytest.raises(ModelError, match="expected float32"):
        LAYOUT.pairs(np.zeros(LAYOUT.size - 1, dtype=np.float32))
