"""The layout of a core adapter: blocks by rank indices, the LoRA adapter it folds into, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.core.adapter.adapter_files import load_adapter, save_adapter
from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdaptedModule, adapter_digest
from fedtune.core.adapter.tiers import rank_indices, rank_slices
from fedtune.core.errors import ModelError

MODULES = (AdaptedModule("layers.0.q", 6, 5), AdaptedModule("layers.0.up", 5, 10))
WEIGHTS = {
    module.name: np.random.default_rng(0).standard_normal((module.d_out, module.d_in)).astype(np.float32)
    for module in MODULES
}
LAYOUT = CoreLayout.between(MODULES, 4, 8.0, WEIGHTS.__getitem__)


def drawn() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(LAYOUT.size).astype(np.float32)


def test_the_vector_holds_one_square_matrix_a_module_and_starts_at_zero() -> None:
    assert LAYOUT.size == 2 * 4 * 4
    assert LAYOUT.segment("r") == slice(0, LAYOUT.size)
    assert not LAYOUT.initial(3).any()
    assert [part.size for part in LAYOUT.parts(drawn())] == [LAYOUT.size]
    with pytest.raises(ValueError, match="no ab"):
        LAYOUT.segment("ab")


@pytest.mark.parametrize("tier", [1, 2, 4])
def test_a_tier_owns_the_block_of_its_rank_indices(tier: int) -> None:
    owned = rank_indices(3, 5, 4, tier)
    mask = np.zeros((2, 4, 4), dtype=np.bool_)
    for module in range(2):
        mask[module][np.ix_(owned, owned)] = True
    assert np.array_equal(LAYOUT.coordinates("r", owned), np.flatnonzero(mask))


def test_slices_are_disjoint_and_nested_blocks_and_every_value_has_its_turn() -> None:
    slices = rank_slices(0, 7, 4, [1, 2, 4])
    places = [part.coordinates(LAYOUT, "r") for part in slices]
    assert [len(each) for each in places] == [2 * 1, 2 * 3, 2 * 12]
    assert sorted(np.concatenate(places)) == list(range(LAYOUT.size))
    seen = [LAYOUT.coordinates("r", rank_indices(0, number, 4, 2)) for number in range(80)]
    assert set(np.concatenate(seen)) == set(range(LAYOUT.size))


def test_it_folds_into_lora_factors_with_the_same_change_of_weights() -> None:
    vector = drawn()
    for (name, (lora_a, lora_b)), core in zip(LAYOUT.pairs(vector).items(), vector.reshape(2, 4, 4), strict=True):
        fixed_a, fixed_b = LAYOUT.fixed.pairs[name]
        np.testing.assert_allclose(lora_b @ lora_a, fixed_b @ core @ fixed_a, atol=1e-5)


def test_a_saved_adapter_reads_back_bit_for_bit_and_has_peft_s_file_beside_it(tmp_path: Path) -> None:
    vector = drawn()
    save_adapter(tmp_path, LAYOUT, vector, "base")
    assert adapter_digest(load_adapter(tmp_path, LAYOUT)) == adapter_digest(vector)
    peft = load_file(tmp_path / "adapter_model.safetensors")
    assert np.array_equal(peft["base_model.model.layers.0.q.lora_B.weight"], LAYOUT.pairs(vector)["layers.0.q"][1])


def test_a_rank_over_the_smaller_side_of_a_layer_is_refused_with_the_layer_and_the_most() -> None:
    with pytest.raises(
        ModelError, match=r"adapter\.rank is 6, but layers\.0\.q maps 6 features to 5; expected at most 5"
    ):
        CoreLayout.between(MODULES, 6, 8.0, WEIGHTS.__getitem__)
