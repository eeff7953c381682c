"""A job's training settings reach the trainers under the same names."""

from __future__ import annotations

import dataclasses

import pytest

from fedtune.core.job.local_work import LocalWork, TrainingSettings, local_work

OTHERS = TrainingSettings(
    local_epochs=2.5,
    batch_tokens=64,
    optimizer="muon",
    learning_rate=0.5,
    weight_decay=0.25,
    max_gradient_norm=2.0,
    proximal=0.125,
    gradient_checkpointing=True,
)


def test_every_setting_that_is_a_field_of_the_work_travels() -> None:
    work, settings = local_work(OTHERS, "b", holdout=0.1), dataclasses.asdict(OTHERS)
    shared = settings.keys() & set(LocalWork.__struct_fields__) - {"local_steps"}
    assert {"batch_tokens", "learning_rate", "proximal"} < shared
    defaults = dataclasses.asdict(TrainingSettings())
    assert not {name for name in shared if settings[name] == defaults[name]}, (
        "OTHERS needs a value of its own for these"
    )
    assert {name: getattr(work, name) for name in shared} == {name: settings[name] for name in shared}
    assert (work.factors, work.holdout, work.local_steps) == ("b", 0.1, 0)


@pytest.mark.parametrize(("asked", "expected"), [(None, 20), (3, 3)])
def test_steps_are_counted_unless_epochs_are(asked: int | None, expected: int) -> None:
    work = local_work(TrainingSettings(local_steps=asked, learning_rate=1e-3))
    assert (work.local_steps, work.local_epochs) == (expected, 0.0)


def test_a_core_adapter_is_trained_by_muon_and_lora_by_adamw_unless_the_job_says_otherwise() -> None:
    plain = TrainingSettings(learning_rate=1e-3)
    assert local_work(plain, "r").optimizer == "muon"
    assert local_work(plain, "ab").optimizer == "adamw"
    assert local_work(dataclasses.replace(plain, optimizer="adamw"), "r").optimizer == "adamw"


def test_a_share_of_the_work_is_at_least_one_step() -> None:
    assert local_work(TrainingSettings(local_steps=8, learning_rate=1e-3)).scaled(0.5).local_steps == 4
    assert local_work(TrainingSettings(local_steps=8, learning_rate=1e-3)).scaled(0.01).local_steps == 1
    assert local_work(OTHERS).scaled(0.5).local_epochs == 1.25


def test_a_value_of_the_round_takes_the_place_of_the_settings() -> None:
    assert local_work(OTHERS, learning_rate=0.125).learning_rate == 0.125
