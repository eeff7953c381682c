"""A live device under its plan trains the same as a simulation, and with little memory the same up to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from local_tasks import local_task
from one_backend import Only

from fedtune.client.plan.backend import Case, Measured, Meter
from fedtune.client.plan.calibration import Calibration, CalibrationStore
from fedtune.client.plan.device_plan import DevicePlanner, calibration_key
from fedtune.client.plan.machine import Machine, probe
from fedtune.client.plan.planned_work import PlannedWork
from fedtune.client.plan.planner import NoPlanError, upload_bytes
from fedtune.client.plan.step_costs import Choices, predict_memory
from fedtune.client.torch.torch_backend import TorchBackend
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.torch.training import train_locally
from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import DataError, ModelError, PeerError, RunError
from fedtune.core.job.local_work import TrainingSettings
from fedtune.core.job.settings import (
    AdapterSettings,
    DataSettings,
    FederationSettings,
    Job,
    ModelSettings,
)
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.data.examples import load_examples
from fedtune.model.adapted_model import adapt
from fedtune.model.base_model import load_base
from fedtune.model.shape import shape_of

MakeModel = Callable[..., Path]
LARGE = 1 << 40
TASK = local_task(seed=1, learning_rate=1e-3, local_steps=2, batch_tokens=250)


@pytest.fixture
def folder(make_model: MakeModel) -> Path:
    return make_model("llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"turn on the lamp in room {room}", "completion": f" lamp {room}"} for room in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def terms_for(folder: Path, **changes: Any) -> JobTerms:
    base = Base("/srv/models/llama", load_base(ModelSettings(str(folder))).digest, "nf4", 4, 8.0, ("all-linear",), 96)
    training = {"batch_tokens": 250, "local_steps": 2, "weights": "auto", "precision": "fp32", "learning_rate": 1e-3}
    job = Job(
        adapter=AdapterSettings(rank=4, alpha=8.0),
        data=DataSettings(sequence_length=96),
        training=TrainingSettings(**{**training, **{key: changes[key] for key in changes if key != "deadline"}}),
        federation=FederationSettings(deadline=changes.get("deadline", "auto")),
    )
    return JobTerms(job, base)


def peak(folder: Path, **changes: Any) -> int:
    whole = Choices("dequantized", "fp32", 4, 32, 250, False)
    return predict_memory(shape_of(ModelSettings(str(folder))), replace(whole, **changes), target_share=0.3).peak


def never(case: Case) -> Measured:
    pytest.fail(f"a step was tried: {case}")


class Fixture(TorchBackend):
    """A device whose memory, meter and trial steps the test sets."""

    def __init__(self, tmp_path: Path, bases: Sequence[Path], data: Path) -> None:
        super().__init__(torch.device("cpu"))
        self.shown: list[str] = []
        self.free = LARGE
        self.used = 0
        self.program = int(psutil.Process().memory_info().rss)
        """The program's own memory, read once, since it falls when what other tests left is freed."""
        self.measured: Callable[[Case], Measured] = never
        self.store = CalibrationStore(tmp_path / "calibration")
        planner = DevicePlanner(Only(self), self.store, self.shown.append, probe=self._probe, reserve=0.0)
        self.work = PlannedWork(bases, data, planner)
        self.again = PlannedWork(bases, data, planner)
        """The same device in a restarted process."""

    def warm_up(self) -> None:
        """Does nothing, since the test's process is warm."""

    def measure(self, case: Case) -> Measured:
        return self.measured(case)

    def meter(self) -> Meter:
        return self

    def reset(self) -> int:
        return self.program

    def peak(self) -> int:
        return self.reset() + self.used

    def _probe(self) -> Machine:
        return replace(probe(), memory_free=self.free)

    def update(self, terms: JobTerms) -> Vector:
        """Trains one round as a device does."""
        trainer = self.work.open_trainer(terms.base)
        with self.work.watched():
            examples = self.work.load_examples("", trainer, terms.base.sequence_length)
            return trainer.train(examples, trainer.layout.initial(0), TASK).update


@pytest.fixture
def fixture(tmp_path: Path, folder: Path, data: Path) -> Fixture:
    return Fixture(tmp_path, [folder], data)


def simulated(folder: Path, data: Path) -> Vector:
    model = adapt(load_base(ModelSettings(str(folder)), precision="fp32"), AdapterSettings(rank=4, alpha=8.0))
    examples, _ = load_examples(data, model.base.tokenizer, 96)
    return train_locally(model, examples, model.layout.initial(0), TASK).update


def test_with_memory_to_spare_a_device_trains_what_a_simulation_does_bit_for_bit(
    fixture: Fixture, folder: Path, data: Path
) -> None:
    terms = terms_for(folder)
    outcome = fixture.work.take_on(terms)
    assert (outcome.plan.choices.weights, outcome.plan.choices.tokens) == ("dequantized", 250)
    assert outcome.plan.sequence_length == 96
    assert np.array_equal(fixture.update(terms), simulated(folder, data))


def test_a_device_balances_by_the_field_of_the_signed_terms_or_refuses_the_job(
    fixture: Fixture, folder: Path, data: Path
) -> None:
    plain = terms_for(folder)
    job = replace(plain.job, data=replace(plain.job.data, balance="kind"))
    terms = replace(plain, job=job)
    with pytest.raises(DataError, match=r'mine\.jsonl:1: data\.balance is "kind", but the record has no such field;'):
        fixture.work.take_on(terms)
    rows = [json.loads(line) | {"kind": number < 4} for number, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixture.work.take_on(terms)
    trainer = fixture.work.open_trainer(terms.base)
    labels = [example.label for example in fixture.work.load_examples("", trainer, terms.base.sequence_length)]
    assert labels == [1] * 4 + [0] * 20


def test_short_of_memory_it_packs_cuts_steps_and_checkpoints_and_trains_the_same_up_to_rounding(
    fixture: Fixture, folder: Path, data: Path
) -> None:
    fixture.measured = measured_as_predicted
    terms = terms_for(folder, weights="packed", gradient_checkpointing=True)
    fixture.free = peak(folder, weights="packed", checkpointing=True, tokens=72)
    outcome = fixture.work.take_on(terms)
    assert outcome.plan.choices.tokens < 100
    assert outcome.plan.accumulation > 2
    update = fixture.update(terms)
    trainer = fixture.work.open_trainer(terms.base)
    assert isinstance(trainer, TorchTrainer)
    assert trainer.model.base.weights == "packed"
    assert (trainer.limits.tokens, trainer.limits.checkpointing) == (outcome.plan.choices.tokens, True)
    np.testing.assert_allclose(update, simulated(folder, data), rtol=1e-2, atol=TASK.work.learning_rate * 0.02)


def test_what_does_not_fit_is_refused_with_numbers_and_without_a_path(fixture: Fixture, folder: Path) -> None:
    fixture.free = 300_000
    with pytest.raises(NoPlanError, match=r"needs \d+ MB over the program itself, and 0 MB may be used") as refused:
        fixture.work.take_on(terms_for(folder))
    assert str(folder) not in str(refused.value)
    assert fixture.work.to_json() is None
    with pytest.raises(NoPlanError):
        fixture.work.open_trainer(terms_for(folder).base)
    fixture.free = LARGE
    assert fixture.work.take_on(terms_for(folder)).plan.tier == 4  # asked again, with memory free


def measured_as_predicted(case: Case) -> Measured:
    took = predict_memory(shape_of(case.model), case.choices, target_share=case.target_share).training
    return Measured(0, 0, 0, took, 0.1, case.choices.tokens, case.choices.threads)


def test_a_real_step_is_tried_once_and_only_where_it_could_change_the_plan(fixture: Fixture, folder: Path) -> None:
    tried: list[Case] = []

    def count(case: Case) -> Measured:
        tried.append(case)
        return measured_as_predicted(case)

    fixture.measured = count
    fixture.work.take_on(terms_for(folder))
    assert not tried
    fixture.free = round(peak(folder) * 1.5)
    fixture.work.take_on(terms_for(folder, local_steps=3))
    assert len(tried) == 1
    fixture.work.take_on(terms_for(folder, local_steps=4))
    fixture.again.take_on(terms_for(folder))
    assert len(tried) == 1


def test_a_step_that_is_killed_leaves_the_prediction_to_go_by(fixture: Fixture, folder: Path) -> None:
    def killed(case: Case) -> Measured:
        raise RunError("the calibration step was killed by signal 9")

    fixture.measured = killed
    fixture.free = round(peak(folder) * 1.5)
    assert fixture.work.take_on(terms_for(folder)).measured is None
    assert any("killed by signal 9; using the prediction" in line for line in fixture.shown)


def test_training_that_takes_more_than_it_may_is_cut_finer_and_then_refused_with_the_numbers(
    fixture: Fixture, folder: Path
) -> None:
    terms = terms_for(folder)
    outcome = fixture.work.take_on(terms)
    fixture.update(terms)
    trainer = fixture.work.open_trainer(terms.base)
    # Well over the budget, since the test's own process may give memory back meanwhile.
    fixture.free, fixture.used = 0, outcome.plan.budget + 100_000_000
    with fixture.work.watched():
        pass
    assert "may be used; planning again" in fixture.shown[-1]
    with pytest.raises(NoPlanError, match=r"needs .* and \d+ MB may be used"), fixture.work.watched():
        pass
    assert trainer.limits.tokens == 250


def test_memory_that_betrays_the_prediction_lowers_the_limits_of_the_next_round(fixture: Fixture, folder: Path) -> None:
    fixture.measured = measured_as_predicted
    terms = terms_for(folder, weights="dequantized")
    fixture.free = round(peak(folder) * 1.1)
    outcome = fixture.work.take_on(terms)
    assert outcome.plan.choices.tokens == 250
    fixture.update(terms)
    trainer = fixture.work.open_trainer(terms.base)
    fixture.used = round(outcome.plan.budget * 1.3)
    with fixture.work.watched():
        pass
    assert trainer.limits.tokens is not None
    assert trainer.limits.tokens < 250
    corrected = fixture.work.to_json()
    assert corrected is not None
    assert corrected["predicted"]["kappa"] > 1.2


def test_predicted_and_measured_stand_side_by_side(fixture: Fixture, folder: Path) -> None:
    terms = terms_for(folder)
    fixture.work.take_on(terms)
    before = fixture.work.to_json()
    assert before is not None
    assert before["took"]["rounds"] == 0
    fixture.used = 12_000_000
    fixture.update(terms)
    after = fixture.work.to_json()
    assert after is not None
    took = after["took"]
    assert took["rounds"] == 1
    assert took["peak_bytes"] == 12_000_000
    assert took["seconds"] > 0
    assert took["predicted_peak_bytes"] == after["predicted"]["peak"]


def test_only_the_base_that_was_planned_for_is_opened(fixture: Fixture, folder: Path) -> None:
    terms = terms_for(folder)
    with pytest.raises(PeerError, match="at the registration"):
        fixture.work.open_trainer(terms.base)
    fixture.work.take_on(terms)
    other = msgspec.structs.replace(terms.base, rank=8)
    with pytest.raises(PeerError, match="another base model or adapter than at the registration"):
        fixture.work.open_trainer(other)


def test_a_device_without_the_base_says_which_it_has(
    tmp_path: Path, make_model: MakeModel, folder: Path, data: Path
) -> None:
    terms = terms_for(folder)
    other = make_model("llama", hidden_size=32)
    work = Fixture(tmp_path, [other], data).work
    work.take_on(terms)
    with pytest.raises(ModelError, match=r"this device has .*\(digest [0-9a-f]{16}…\). Join with --base DIR"):
        work.open_trainer(terms.base)
    with pytest.raises(ModelError, match="this device has none"):
        Fixture(tmp_path, [], data).work.take_on(terms)
    both = Fixture(tmp_path, [other, folder], data).work
    both.take_on(terms)
    assert both.open_trainer(terms.base).digest == terms.base.digest


def test_another_format_than_the_loaded_one_is_loaded_again(fixture: Fixture, folder: Path) -> None:
    terms = terms_for(folder)
    fixture.work.take_on(terms)
    fixture.work.open_trainer(terms.base)
    fixture.work.take_on(terms_for(folder, local_steps=5))
    assert not fixture.work.must_reload
    fixture.work.take_on(terms_for(folder, weights="packed"))
    assert fixture.work.must_reload


def test_a_base_is_opened_again_for_another_number_of_threads(fixture: Fixture, folder: Path) -> None:
    terms = terms_for(folder)
    outcome = fixture.work.take_on(terms)
    fixture.work.open_trainer(terms.base)
    key = calibration_key(outcome.machine, outcome.shape, outcome.plan)
    fixture.store.keep(key, Calibration(1.0, 0.01, outcome.plan.choices.threads + 1))
    fixture.work.take_on(terms_for(folder, local_steps=5))
    assert fixture.work.must_reload


def test_the_line_decides_the_tier_and_a_slow_upload_bars_nobody_for_good(fixture: Fixture, folder: Path) -> None:
    shape = shape_of(ModelSettings(str(folder)))
    terms = terms_for(folder, deadline=40.0)
    whole = replace(terms.job, adapter=replace(terms.job.adapter, rank=16))
    timed = JobTerms(whole, msgspec.structs.replace(terms.base, rank=16))
    fixture.work.uplink = upload_bytes(shape, 8) / 10
    assert fixture.work.take_on(timed).plan.tier == 8
    fixture.work.uplink = 1.0
    training = replace(timed.job.training, local_steps=3)
    slower = replace(timed, job=replace(timed.job, training=training))
    with pytest.raises(NoPlanError, match="at 1 bytes a second"):
        fixture.work.take_on(slower)
    assert fixture.work.take_on(slower).plan.tier == 16
