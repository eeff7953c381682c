"""Clients that train side by side: the rounds are those of clients one after another, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_helpers import SECURE, Simulate, go_on, small_job, without_pictures

from fedtune.core.job.job_file import load_job
from fedtune.server.run_directory import RunDirectory, read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate as simulate_job
from fedtune.server.simulation.simulation_context import SimulationContext

FOUR = "simulation.together=4"
SHORT = (
    "federation.clients_per_round=4",
    "training.batch_tokens=64",
    "data.sequence_length=64",
    "compression.preset=none",
)
FAULTS = ("simulation.dropout=0.2", "simulation.failing=0.2", "data.holdout=0.2")
WORKERS = "simulation.workers=2"
NEAR = (
    0.02  # of the norm of all that a run has changed, in float32: AdamW's steps are coarse where a gradient is near 0
)


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def adapter(path: Path) -> Any:
    directory = RunDirectory.open(path)
    try:
        restored = directory.restore()
    finally:
        directory.close()
    assert restored is not None
    return restored.state.adapter


def told(path: Path) -> list[Any]:
    """Returns everything about the clients of each round that rounding must not change."""
    return [
        [(client["id"], client["dropped"], client["bytes_up"]) for client in line["clients"]]
        for line in read_rounds(path)
    ]


@pytest.mark.parametrize("kind", [(), FAULTS, ("adapter.kind=core", "training.optimizer=adamw")])
def test_four_clients_in_a_pass_give_nearly_the_adapter_of_one_after_another(
    kind: tuple[str, ...], simulate: Simulate, tmp_path: Path
) -> None:
    alone, together = simulate(*SHORT, *kind, name="alone"), simulate(*SHORT, *kind, FOUR, name="together")
    assert together["bytes"] == alone["bytes"]
    assert told(tmp_path / "together") == told(tmp_path / "alone")
    one, other = adapter(tmp_path / "alone"), adapter(tmp_path / "together")
    start = SimulationContext.begin(small_job(*kind), tmp_path / "start").model.layout.initial(0)
    assert 0 < np.linalg.norm(other - one) < NEAR * np.linalg.norm(one - start)
    assert together["eval_after"]["loss"] == pytest.approx(alone["eval_after"]["loss"], rel=1e-4)


def test_a_secure_round_has_messages_of_the_same_bytes_and_nearly_the_same_sum(
    simulate: Simulate, tmp_path: Path
) -> None:
    # No client evaluates: its message holds the adapter's change, whose entropy-coded length follows from its values.
    kind = (*SECURE, "simulation.dropout=0.1", "training.local_steps=2", "federation.rounds=1", "data.holdout=0.0")
    alone, together = simulate(*kind, name="alone"), simulate(*kind, FOUR, name="together")
    assert together["bytes"] == alone["bytes"]
    assert told(tmp_path / "together") == told(tmp_path / "alone")
    one, other = adapter(tmp_path / "alone"), adapter(tmp_path / "together")
    start = SimulationContext.begin(small_job(*kind), tmp_path / "start").model.layout.initial(0)
    assert 0 < np.linalg.norm(other - one) < 5 * NEAR * np.linalg.norm(one - start), (
        "the sum is rounded to a ring's words"
    )


@pytest.mark.parametrize("kind", [(*SHORT, *FAULTS), (*SECURE, "simulation.dropout=0.1")])
def test_the_number_of_workers_changes_no_bit_of_passes_either(kind: tuple[str, ...], simulate: Simulate) -> None:
    alone, spread = simulate(*kind, FOUR, name="alone"), simulate(*kind, FOUR, WORKERS, name="spread")
    assert spread["adapter_digest"] == alone["adapter_digest"]
    assert spread["bytes"] == alone["bytes"]


def test_a_resumed_run_keeps_the_number_that_auto_chose(simulate: Simulate, tmp_path: Path) -> None:
    whole = simulate(*SHORT, "simulation.together=auto", name="whole")
    recorded = load_job(tmp_path / "whole" / "job.toml")
    assert recorded.simulation.together == 4
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt), without_pictures():
        simulate_job(small_job(*SHORT, "simulation.together=auto"), half, Stopped())
    assert go_on(half)["adapter_digest"] == whole["adapter_digest"]


class Stopped(Silent):
    """Interrupts a run after its second round."""

    def round(self, record: Any) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


def test_a_reason_to_train_one_after_another_is_noted_once(tmp_path: Path) -> None:
    notes = Notes()
    with without_pictures():
        simulate_job(small_job(*SHORT, FOUR, "training.precision=fp16", "federation.rounds=2"), tmp_path / "run", notes)
    assert sum("one after another" in line and "fp16" in line for line in notes.lines) == 1
