"""Whole federations with a core adapter: masked, with mixed ranks, resumed and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from federation_helpers import SECURE, Simulate, go_on, run, small_job
from safetensors.numpy import load_file

from fedtune.core.protocol.model_manifest import verify
from fedtune.server.run_directory import read_rounds
from fedtune.server.run_display import Silent

CORE = ("adapter.kind=core", "adapter.rank=8", "training.learning_rate=0.02")


@pytest.mark.usefixtures("paired")
def test_a_masked_sum_gives_the_adapter_that_the_same_sum_in_the_clear_gives(simulate: Simulate) -> None:
    masked = simulate(*SECURE, *CORE, name="masked")
    clear = simulate(*SECURE, *CORE, "secure_aggregation.enabled=false", "compression.form=ring", name="clear")
    assert masked["adapter_digest"] == clear["adapter_digest"]
    assert masked["fp32_fedavg_rank"] == 16
    assert masked["adapter_parameters"] * 4 * (5 + 5) * 2 < masked["fp32_fedavg_bytes"] / 10


def test_clients_of_smaller_ranks_train_blocks_of_it_and_the_loss_falls(simulate: Simulate, tmp_path: Path) -> None:
    summary = simulate(*CORE, "simulation.ranks=[4, 8]", "training.local_steps=4")
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]
    ranks = {client["rank"] for line in read_rounds(tmp_path / "run") for client in line["clients"]}
    assert ranks == {4, 8}


class StopsAfterTwo(Silent):
    def round(self, record: object) -> None:
        if getattr(record, "round", 0) == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_same_adapter_and_its_files(simulate: Simulate, tmp_path: Path) -> None:
    whole = simulate(*CORE)
    with pytest.raises(KeyboardInterrupt):
        run(small_job(*CORE), tmp_path / "half", StopsAfterTwo())
    assert go_on(tmp_path / "half")["adapter_digest"] == whole["adapter_digest"]
    core = load_file(tmp_path / "half" / "adapter" / "core.safetensors")
    folded = load_file(tmp_path / "half" / "adapter" / "adapter_model.safetensors")
    assert all(matrix.shape == (8, 8) and np.isfinite(matrix).all() for matrix in core.values())
    assert len(folded) == 2 * len(core)


def test_an_export_merges_it_and_passes_the_gate(simulate: Simulate) -> None:
    summary = simulate(*CORE, 'export.formats=["fp32"]', "federation.rounds=1")
    (done,) = summary["exports"]
    assert verify(Path(done["path"])).provenance["adapter_digest"] == summary["adapter_digest"]
    assert [answer["exported"] for answer in summary["answers"]] == [answer["after"] for answer in summary["answers"]]
