"""A device with an edge pack plans, measures and serves like one with torch, and never imports torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_tasks import local_task
from one_backend import Only
from owner import make_server
from without_torch import environment_without_torch

from fedtune.client.onnx.onnx_backend import OnnxBackend
from fedtune.client.onnx.onnx_trainer import OnnxTrainer
from fedtune.client.plan.backend import Backend, Case, Measured
from fedtune.client.plan.brought_bases import plan_bases
from fedtune.client.plan.calibration import CalibrationStore
from fedtune.client.plan.device_plan import DevicePlanner
from fedtune.client.plan.installed import INSTALLED, InstalledBackends
from fedtune.client.plan.machine import Machine, probe
from fedtune.client.plan.planned_work import PlannedWork
from fedtune.client.plan.planner import NoPlanError
from fedtune.client.plan.step_costs import Choices, kappa_of, predict_memory
from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.core.errors import MissingExtraError, ModelError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import DEMO, ModelSettings
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.edge.pack_facts import read_facts
from fedtune.model.shape import shape_of
from fedtune.server.live.server_home import ServerConfig

MakeModel = Callable[..., Path]
JOB = ("adapter.kind=lora", "adapter.rank=4", "data.sequence_length=64", "training.batch_tokens=256")
LARGE = 1 << 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"turn on the lamp in room {room} =>", "completion": f" lamp {room}"} for room in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Told(OnnxBackend):
    """A backend with the test's measurements."""

    def __init__(self, measured: Callable[[Case], Measured]) -> None:
        self._measured = measured

    def measure(self, case: Case) -> Measured:
        return self._measured(case)


class WithoutTorch(InstalledBackends):
    """A machine without torch."""

    def installed(self, base: str) -> bool:
        return super().installed(base) and (Path(base) / "edge.json").is_file()

    def of(self, base: str) -> Backend:
        if not self.installed(base):
            raise MissingExtraError(f"training on {base}", "client", "torch")
        return super().of(base)


def never(case: Case) -> Measured:
    pytest.fail(f"a step was tried: {case}")


def planner_of(tmp_path: Path, measured: Callable[[Case], Measured] = never, **options: Any) -> DevicePlanner:
    return DevicePlanner(Only(Told(measured)), CalibrationStore(tmp_path / "calibration"), **options)


def test_a_pack_is_planned_measured_and_foretold_within_a_factor_of_two(demo_pack: Path, tmp_path: Path) -> None:
    job = load_job(None, [*JOB, f"model.base={demo_pack}"])
    outcome = DevicePlanner(INSTALLED, CalibrationStore(tmp_path)).plan(job)
    assert (outcome.trainer, outcome.plan.choices.weights) == ("onnxruntime", "unpacked")
    assert (outcome.plan.choices.precision, outcome.machine.gpus) == ("fp32", ())
    assert outcome.plan.memory.mapped == (demo_pack / "weights.safetensors").stat().st_size
    assert outcome.measured is not None
    assert outcome.predicted_measured is not None
    assert 0.5 < outcome.predicted_measured[0] / outcome.measured.peak < 2
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_measured_corrects_the_next_plan_of_a_pack(demo_pack: Path, tmp_path: Path) -> None:
    job = load_job(None, [*JOB, f"model.base={demo_pack}"])
    first = planner_of(tmp_path).plan(job, trial="never")
    took = Measured(1, 1, 1, 2 * first.plan.memory.training, 1.5, first.plan.choices.tokens, 3)
    planner_of(tmp_path, lambda case: took).plan(job)
    again = planner_of(tmp_path).plan(job, trial="never")
    assert again.plan.memory.training == pytest.approx(2 * first.plan.memory.training, rel=1e-6)
    assert again.seconds_per_step == pytest.approx(1.5)
    assert again.plan.choices.threads == 3


@pytest.mark.parametrize(("parameters", "cores", "threads"), [(0, 4.0, 1), (10**8, 4.0, 4), (10**8, 0.5, 1)])
def test_a_large_model_trains_on_all_cores_and_a_small_one_on_one(
    demo_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: int, cores: float, threads: int
) -> None:
    shape = read_facts(demo_pack).shape
    monkeypatch.setattr(OnnxBackend, "shape", lambda self, model: replace(shape, other_parameters=parameters))
    machine = replace(probe(), cores=cores)
    planner = DevicePlanner(INSTALLED, CalibrationStore(tmp_path), probe=lambda: machine)
    outcome = planner.plan(load_job(None, [*JOB, f"model.base={demo_pack}"]), trial="never")
    assert outcome.plan.choices.threads == threads


def test_kappa_of_a_pack_gives_the_measured_peak(demo_pack: Path) -> None:
    shape, choices = read_facts(demo_pack).shape, Choices("mapped", "fp32", 8, 64, 256, True)
    kappa = kappa_of(shape, choices, 90_000_000, target_share=0.4)
    assert predict_memory(shape, choices, target_share=0.4, kappa=kappa).training == pytest.approx(90_000_000, abs=2)


def test_memory_decides_whether_activations_are_kept_and_weights_are_unpacked_once(
    demo_pack: Path, tmp_path: Path
) -> None:
    job = load_job(None, [*JOB, f"model.base={demo_pack}"])
    planner, shape = planner_of(tmp_path, reserve=0.0), read_facts(demo_pack).shape
    for weights, checkpointing in OnnxBackend.forms:
        peak = predict_memory(shape, Choices(weights, "fp32", 4, 64, 64, checkpointing)).peak
        found = planner.plan(job, trial="never", memory=peak + 1, runtime=0).plan.choices
        assert (found.weights, found.checkpointing) == (weights, checkpointing)


def test_mapped_weights_may_be_larger_than_the_budget_but_no_batch_is_widened_at_their_cost(
    demo_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "forms", (("mapped", True),))
    job = load_job(None, [*JOB, f"model.base={demo_pack}"])
    roomy = planner_of(tmp_path).plan(job, trial="never")
    shape, one = roomy.shape, replace(roomy.plan.choices, tokens=64)
    least = predict_memory(shape, one).peak
    for memory, tokens in (
        (least, 64),
        (roomy.plan.memory.peak, 128),
        (roomy.plan.memory.peak + shape.file_bytes, 256),
    ):
        planner = planner_of(tmp_path, reserve=0.0)
        found = planner.plan(job, trial="never", memory=memory + 1, runtime=0)
        assert found.plan.choices.tokens == tokens
    with pytest.raises(NoPlanError, match=r"the smallest plan \(mapped, fp32, 64 tokens at once"):
        planner_of(tmp_path, reserve=0.0).plan(job, trial="never", memory=least - 1_000_000, runtime=0)


@pytest.mark.parametrize("wanted", ["training.weights=packed", "training.precision=bf16"])
def test_a_job_that_wants_another_form_is_refused_by_a_plan(demo_pack: Path, tmp_path: Path, wanted: str) -> None:
    job = load_job(None, [*JOB, f"model.base={demo_pack}", wanted])
    with pytest.raises(NoPlanError, match="this device can hold the base model mapped or unpacked, and the job wants"):
        planner_of(tmp_path).plan(job, trial="never")


def test_a_pack_in_another_quantization_than_the_job_s_is_refused(demo_pack: Path, tmp_path: Path) -> None:
    job = load_job(None, [*JOB, f"model.base={demo_pack}", "model.quantization=int4"])
    with pytest.raises(ModelError, match="an edge pack is in nf4; the job wants int4"):
        planner_of(tmp_path).plan(job, trial="never")


def test_plans_for_what_a_device_brings_leave_out_what_it_cannot_train(
    demo_pack: Path, make_model: MakeModel, data: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    planner = DevicePlanner(WithoutTorch(), CalibrationStore(tmp_path / "calibration"), notes.append)
    folder = make_model("llama")
    (outcome,) = plan_bases(planner, [folder, demo_pack], data, "never")
    assert outcome.shape.name == str(demo_pack)
    assert notes == [f"{folder}: the library that trains it is not installed here"]
    with pytest.raises(MissingExtraError, match="needs the package torch"):
        plan_bases(planner, [folder], data, "never")


def demo_terms(demo_pack: Path, **training: Any) -> JobTerms:
    job = load_job(None, [*JOB, "training.precision=fp32", *(f"training.{key}={training[key]}" for key in training)])
    return JobTerms(job, Base(DEMO, read_facts(demo_pack).base_digest, "nf4", 4, 8.0, ("all-linear",), 64))


def work_of(
    tmp_path: Path, bases: Sequence[Path], data: Path, free: int = LARGE, *, torch: bool = True
) -> tuple[PlannedWork, list[str]]:
    def machine() -> Machine:
        return replace(probe(), memory_free=free)

    notes: list[str] = []
    backends = INSTALLED if torch else WithoutTorch()
    store = CalibrationStore(tmp_path / "calibration")
    return PlannedWork(bases, data, DevicePlanner(backends, store, notes.append, probe=machine)), notes


def test_a_job_on_the_demo_is_served_by_a_pack_of_it_where_torch_is_missing(
    demo_pack: Path, data: Path, tmp_path: Path
) -> None:
    work, notes = work_of(tmp_path, [demo_pack], data, torch=False)
    terms = demo_terms(demo_pack)
    assert work.take_on(terms).trainer == "onnxruntime"
    trainer = work.open_trainer(terms.base)
    assert isinstance(trainer, OnnxTrainer)
    assert trainer.limits.tokens == 256
    with work.watched():
        examples = work.load_examples("", trainer, 64)
        result = trainer.train(
            examples, trainer.layout.initial(0), local_task(seed=1, local_steps=2, learning_rate=1e-3)
        )
    assert np.any(result.update)
    assert work.took.rounds == 1
    shown = work.to_json()
    assert shown is not None
    assert shown["plan"]["trainer"] == "onnxruntime"
    assert shown["took"]["peak_bytes"] is not None
    assert any(note.startswith("data: ") for note in notes)


def test_with_torch_the_model_itself_comes_first_and_the_pack_where_that_does_not_fit(
    demo_pack: Path, data: Path, tmp_path: Path
) -> None:
    terms = demo_terms(demo_pack)
    work, _ = work_of(tmp_path, [demo_pack], data)
    assert work.take_on(terms).trainer == "torch"
    assert isinstance(work.open_trainer(terms.base), TorchTrainer)
    work, _ = work_of(tmp_path, [demo_pack], data)
    assert work.take_on(demo_terms(demo_pack, weights="auto", gradient_checkpointing="true")).trainer == "torch"
    small, _ = work_of(tmp_path, [demo_pack], data)
    planner = small._planner
    planner.backends = OnlyPacksFit()
    assert small.take_on(terms).trainer == "onnxruntime"
    assert not small.must_reload
    assert isinstance(small.open_trainer(terms.base), OnnxTrainer)


class OnlyPacksFit(InstalledBackends):
    """A machine whose memory is too small for every model that torch holds."""

    def of(self, base: str) -> Backend:
        backend = super().of(base)
        return backend if backend.name == "onnxruntime" else NoRoom(backend)


class NoRoom:
    """A backend whose models are huge."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def shape(self, model: ModelSettings) -> Any:
        return replace(self._backend.shape(model), other_parameters=1 << 50)


def test_a_device_whose_packs_are_of_other_bases_says_which_it_has(
    demo_pack: Path, data: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(demo_pack, tmp_path / "damaged"))
    (damaged / "edge.json").write_text("{}")
    work, notes = work_of(tmp_path, [demo_pack, damaged], data, torch=False)
    terms = demo_terms(demo_pack)
    other = JobTerms(terms.job, Base("/srv/other", "0" * 64, "nf4", 4, 8.0, ("all-linear",), 64))
    with pytest.raises(ModelError, match=rf"this device has {demo_pack} \(digest [0-9a-f]{{16}}…\), {damaged}"):
        work.take_on(other)
    assert any("not the facts of an edge pack" in note for note in notes)
    assert work.take_on(terms).trainer == "onnxruntime"
    work, _ = work_of(tmp_path, [make_model("llama")], data, torch=False)
    with pytest.raises(MissingExtraError, match="needs the package torch"):
        work.take_on(other)


def test_where_one_pack_is_damaged_the_next_one_of_the_same_base_is_taken(
    demo_pack: Path, data: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(demo_pack, tmp_path / "damaged"))
    weights = damaged / "weights.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))  # of the right length, so that only reading it tells
    terms = demo_terms(demo_pack)
    work, notes = work_of(tmp_path, [damaged, demo_pack], data, torch=False)
    work.take_on(terms)
    assert isinstance(work.open_trainer(terms.base), OnnxTrainer)
    assert any("weights.safetensors: was changed" in note for note in notes)
    work, _ = work_of(tmp_path, [damaged], data, torch=False)
    work.take_on(terms)
    with pytest.raises(ModelError, match=r"weights.safetensors: .*pull the pack again"):
        work.open_trainer(terms.base)


def test_a_model_that_torch_holds_is_loaded_again_where_the_plan_turns_to_the_pack(
    demo_pack: Path, data: Path, tmp_path: Path
) -> None:
    work, _ = work_of(tmp_path, [demo_pack], data)
    work.take_on(demo_terms(demo_pack))
    work.open_trainer(demo_terms(demo_pack).base)
    work._planner.backends = OnlyPacksFit()
    work.take_on(demo_terms(demo_pack, local_steps=3))
    assert work.must_reload


def test_sizes_of_a_pack_are_those_of_its_base(demo_pack: Path) -> None:
    ours = OnnxBackend().shape(ModelSettings(str(demo_pack)))
    assert replace(ours, name=DEMO, file_bytes=0, linear=()) == replace(
        shape_of(ModelSettings()), file_bytes=0, linear=()
    )


def test_plan_and_join_run_where_torch_cannot_be_imported(demo_pack: Path, data: Path, tmp_path: Path) -> None:
    environment = environment_without_torch(tmp_path)
    run = [sys.executable, "-W", "error", "-c", "from fedtune.server import cli; cli.main()"]
    command = [*run, "plan", "--base", str(demo_pack), "--data", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["plan"]["trainer"] == "onnxruntime"
    assert planned["measured"]["peak_bytes"] > 1_000_000
    make_server(tmp_path / "server", ServerConfig(address="localhost:1", listen="127.0.0.1", port=1))
    join = ["client", "join", str(tmp_path / "server" / "invitation.json"), "--name", "kitchen", "--data", str(data)]
    command = [*run, *join, "--base", str(demo_pack), "--home", str(tmp_path / "device")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"plan for {demo_pack}: edge pack, 3 MB of weights unpacked once, fp32" in done.stdout
    assert "trainer: onnxruntime" in done.stdout
    assert "one step:" in done.stdout
    done = subprocess.run(
        [*run, *join, "--home", str(tmp_path / "bare")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "no torch here, and no edge pack: this device can pull models and answer" in done.stdout
    done = subprocess.run([*run, "plan"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "training on the base model demo (edge packs need no torch) needs the package torch" in " ".join(
        done.stderr.split()
    )
