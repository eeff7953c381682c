"""`fedtune plan`: the plan under which this device would train, and a check of its predictions.

planner = this_device(CalibrationStore(default_folder()), print)
print(planner.plan(job, Path("mine.jsonl")).to_json())
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from fedtune.client.plan.backend import Backend, Backends, Case, Measured
from fedtune.client.plan.calibration import Calibration, CalibrationStore
from fedtune.client.plan.installed import INSTALLED
from fedtune.client.plan.machine import Machine, probe
from fedtune.client.plan.planner import RESERVE, Constraints, Plan, choose, longest_example
from fedtune.client.plan.step_costs import Choices, kappa_of, predict_memory, step_seconds
from fedtune.core.job.local_work import TrainingSettings
from fedtune.core.job.settings import (
    DEMO,
    AdapterSettings,
    Job,
    ModelSettings,
)
from fedtune.data.examples import Example, load_examples
from fedtune.data.job_inputs import own_data_file
from fedtune.model.shape import SMALL_MODEL, ModelShape

ROOMY = 2.0  # predictions err by less than this factor: with as much room, no trial step would change the plan

Trial = Literal["always", "where tight", "never"]


@dataclass(frozen=True)
class Link:
    """The known speed of the link to the server: bytes a second and seconds, or None."""

    up: float | None = None
    down: float | None = None
    deadline: float | None = None

    def seconds(self, plan: Plan) -> float:
        """Returns the seconds in which a round's update and adapter travel, as far as they are known."""
        return (plan.bytes_up / self.up if self.up else 0.0) + (plan.bytes_down / self.down if self.down else 0.0)


@dataclass(frozen=True)
class Outcome:
    """A plan with its prediction, and the measurements of a trial step.

    Args:
        trainer: the library that trains.
        local_steps: optimizer steps of a round.
        seconds_per_step: predicted seconds of an optimizer step.
        seconds_per_round: predicted seconds of a round, including the link where its speed is known.
        kappa: correction that the prediction used; 1 on a device that has never measured.
        measured: measurements; None without a trial step.
        predicted_measured: prediction for the step that was measured, peak and seconds.
    """

    trainer: str
    machine: Machine
    shape: ModelShape
    plan: Plan
    runtime: int
    native_unpacking: bool
    target_share: float
    local_steps: int
    seconds_per_step: float
    seconds_per_round: float
    kappa: float
    measured: Measured | None
    predicted_measured: tuple[int, float] | None

    @property
    def training_seconds(self) -> float:
        """Predicted seconds of a round without the link."""
        return self.local_steps * self.seconds_per_step

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, in bytes and seconds."""
        choices, plan = self.plan.choices, self.plan
        measured = None
        if self.measured and self.predicted_measured:
            peak, seconds = self.predicted_measured
            measured = {
                "peak_bytes": self.measured.peak,
                "runtime_bytes": self.measured.runtime,
                "micro_batch_seconds": self.measured.step_seconds,
                "predicted_peak_bytes": peak,
                "predicted_micro_batch_seconds": seconds,
                "peak_ratio": peak / self.measured.peak,
            }
        return {
            "device": asdict(self.machine),
            "model": {
                "base": self.shape.name,
                "linear_parameters": self.shape.linear_parameters,
                "other_parameters": self.shape.other_parameters,
                "layers": self.shape.layers,
                "vocabulary": self.shape.vocabulary,
            },
            "plan": {
                "trainer": self.trainer,
                "weights": choices.weights,
                "quantization": choices.quantization,
                "precision": choices.precision,
                "threads": choices.threads,
                "native_nf4": self.native_unpacking,
                "rank": choices.rank,
                "tier": plan.tier,
                "sequence_length": plan.sequence_length,
                "longest_example": choices.sequence_length,
                "micro_batch_tokens": choices.tokens,
                "accumulation": plan.accumulation,
                "gradient_checkpointing": choices.checkpointing,
            },
            "predicted": {
                **asdict(plan.memory),
                "peak": plan.memory.peak,
                "runtime": self.runtime,
                "budget": plan.budget,
                "kappa": self.kappa,
                "seconds_per_step": self.seconds_per_step,
                "seconds_per_round": self.seconds_per_round,
                "bytes_up": plan.bytes_up,
                "bytes_down": plan.bytes_down,
            },
            "measured": measured,
        }


@dataclass(frozen=True)
class _Question:
    """The inputs of a plan: the library, this machine's memory, a model, and the job's constraints."""

    backend: Backend
    machine: Machine
    shape: ModelShape
    constraints: Constraints
    budget: int
    target_share: float

    def choose(self, known: Calibration | None = None) -> Plan:
        kappa, constraints = 1.0, self.constraints
        if known:
            kappa, constraints = known.kappa, replace(constraints, threads=known.threads)
        return choose(self.shape, constraints, self.budget, target_share=self.target_share, kappa=kappa)

    def predicted_peak(self, choices: Choices, kappa: float) -> int:
        return predict_memory(self.shape, choices, target_share=self.target_share, kappa=kappa).peak

    def calibration(self, choices: Choices, measured: Measured) -> Calibration:
        kappa = kappa_of(self.shape, choices, measured.training, target_share=self.target_share)
        return Calibration(kappa, measured.step_seconds / measured.tokens, measured.threads)


@dataclass(frozen=True)
class _Answer:
    """A plan, the calibration that it uses, and the trial step that confirmed it."""

    plan: Plan
    kappa: float
    known: Calibration | None
    measured: Measured | None = None
    predicted_measured: tuple[int, float] | None = None


class DevicePlanner:
    """Probes this device and plans for jobs.

        planner = DevicePlanner(INSTALLED, CalibrationStore(default_folder()))
        outcome = planner.plan(job, Path("mine.jsonl"))

    Args:
        backends: the training libraries; the form of a job's base model decides which of them trains it.
        store: the store of κ.
        note: receives messages about the progress.
        probe: inspects the machine.
        reserve: share of the free memory that stays free.
    """

    def __init__(
        self,
        backends: Backends,
        store: CalibrationStore,
        note: Callable[[str], None] = lambda _: None,
        *,
        probe: Callable[[], Machine] = probe,
        reserve: float = RESERVE,
    ) -> None:
        self.backends = backends
        self.store = store
        self.note = note
        self._probe = probe
        self._reserve = reserve

    def plan(
        self,
        job: Job,
        data: Path | Sequence[Example] | None = None,
        link: Link = Link(),
        trial: Trial = "always",
        *,
        memory: int | None = None,
        runtime: int | None = None,
    ) -> Outcome:
        """Plans for a job.

        Args:
            job: source of base model, rank, batch and steps.
            data: this device's examples, or a file of them; their lengths decide the sequence length.
            link: the link to the server.
            trial: when to take a trial step, correct the plan by it and store κ; "where tight" takes one per model,
                and only where it could change the plan.
            memory: bytes to plan for instead of those that are free now.
            runtime: bytes that this process takes without a model; None where it holds none now.

        Raises:
            NoPlanError: no plan fits; the message has the numbers.
            DataError, ModelError: the data or the model cannot be used.
            RunError: the trial step failed.
        """
        backend = self.backends.of(job.model.base)
        shape = backend.shape(job.model)
        lengths, target_share = _lengths(job, data, backend)
        machine = replace(self._probe(), gpus=backend.gpus())
        runtime = int(psutil.Process().memory_info().rss) if runtime is None else runtime
        budget = self._budget(backend, machine, memory, runtime)
        constraints = replace(_constraints(backend, job, lengths, link), threads=_threads(backend, shape, machine))
        question = _Question(backend, machine, shape, constraints, budget, target_share)
        answer = self._answer(job, question, trial)
        plan, steps = answer.plan, question.constraints.local_steps
        per_step = self._seconds(question, plan.choices, answer.known) * plan.accumulation
        return Outcome(
            trainer=backend.name,
            machine=machine,
            shape=shape,
            plan=plan,
            runtime=runtime,
            native_unpacking=plan.choices.quantization == "nf4" and backend.native_unpacking(),
            target_share=target_share,
            local_steps=steps,
            seconds_per_step=per_step,
            seconds_per_round=per_step * steps + link.seconds(plan),
            kappa=answer.kappa,
            measured=answer.measured,
            predicted_measured=answer.predicted_measured,
        )

    def _budget(self, backend: Backend, machine: Machine, memory: int | None, runtime: int) -> int:
        """Returns the bytes that a model may take; this process already holds the libraries of the training process."""
        free = machine.gpus[0].free if backend.on_gpu else machine.memory_free
        allowed = round((memory or free + backend.held_bytes()) * (1 - self._reserve))
        return allowed if backend.on_gpu else allowed - runtime

    def _answer(self, job: Job, question: _Question, trial: Trial) -> _Answer:
        """Chooses a plan from the known calibrations, and from a trial step where one is requested."""
        answer = self._by_memory(question)
        if trial == "never":
            return answer
        tight = answer.known is None and answer.plan.memory.peak * ROOMY > question.budget
        if trial == "where tight" and not tight:
            return answer
        answer = self._tried(job, question, answer)
        assert answer.measured is not None
        assert answer.known is not None
        if answer.measured.peak <= question.budget:
            return answer
        self.note("it took more than predicted; planning again")  # a first real step may exceed the budget
        plan = question.choose(answer.known)
        answer = replace(answer, plan=plan, kappa=answer.known.kappa)
        return self._tried(job, question, answer) if trial == "always" else answer

    def _by_memory(self, question: _Question) -> _Answer:
        """Chooses by the prediction, corrected by an earlier trial step of the resulting plan."""
        plan = question.choose()
        if known := self.store.get(calibration_key(question.machine, question.shape, plan)):
            return _Answer(question.choose(known), known.kappa, known)
        return _Answer(plan, 1.0, None)

    def _tried(self, job: Job, question: _Question, answer: _Answer) -> _Answer:
        """Takes a trial step under the plan, and stores the resulting calibration."""
        case = _case(job, answer.plan, question)
        seconds = self._seconds(question, case.choices, answer.known)
        prediction = (question.predicted_peak(case.choices, answer.kappa), seconds)
        self.note(f"trying one step of {case.micro_batch} × {case.choices.sequence_length} tokens")
        measured = question.backend.measure(case)
        known = question.calibration(case.choices, measured)
        self.store.keep(calibration_key(question.machine, question.shape, answer.plan), known)
        plan = replace(answer.plan, choices=replace(answer.plan.choices, threads=known.threads))
        return replace(answer, plan=plan, known=known, measured=measured, predicted_measured=prediction)

    def _seconds(self, question: _Question, choices: Choices, known: Calibration | None) -> float:
        """Predicts the seconds of a micro-batch."""
        if known:
            return known.seconds_per_token * choices.tokens
        rate = question.backend.product_rate(question.shape, choices)
        return step_seconds(question.shape, choices, rate, choices.tokens, question.target_share)


def this_device(store: CalibrationStore, note: Callable[[str], None]) -> DevicePlanner:
    """Makes the planner of this machine, with the libraries that are installed here."""
    return DevicePlanner(INSTALLED, store, note)


def default_folder() -> Path:
    """Returns the folder of this device's calibrations."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fedtune" / "calibration"


def calibration_key(machine: Machine, shape: ModelShape, plan: Plan) -> str:
    """Returns the key of a calibration: this device, this model's sizes, and the plan's weights format."""
    gpu = machine.gpus[0].name if machine.gpus else ""
    sizes = hashlib.sha256(repr(replace(shape, name="", file_bytes=0)).encode()).hexdigest()
    choices = plan.choices
    packed = f"{choices.quantization} " if choices.weights == "packed" else ""
    form = f"{packed}{choices.weights} {choices.precision} {choices.checkpointing}"
    return f"{machine.processor}|{machine.cores}|{machine.memory_total}|{gpu}|{sizes}|{form}"


def _threads(backend: Backend, shape: ModelShape, machine: Machine) -> int:
    """Returns the number of threads for a model that no step was tried of: one where more are likely to be slower."""
    return 1 if backend.on_gpu or shape.parameters < SMALL_MODEL else max(1, int(machine.cores))


def _constraints(backend: Backend, job: Job, lengths: Sequence[int], link: Link) -> Constraints:
    training = job.training
    precision = backend.best_precision() if training.precision == "auto" else training.precision
    return replace(
        Constraints.of(job, precision),
        longest=longest_example(lengths, job.data.sequence_length),
        local_steps=_local_steps(training, lengths),
        deadline=link.deadline,
        bandwidth_up=link.up,
        bandwidth_down=link.down,
        cuda=backend.on_gpu,
        forms=backend.forms,
    )


def _local_steps(training: TrainingSettings, lengths: Sequence[int]) -> int:
    """Returns the optimizer steps of a round; for a job that counts epochs, an estimate from this data."""
    if training.local_epochs is None:
        return training.steps
    return max(1, round(training.local_epochs * -(-sum(lengths) // training.batch_tokens)))


def _lengths(job: Job, data: Path | Sequence[Example] | None, backend: Backend) -> tuple[list[int], float]:
    """Returns the examples' token counts, and the share of tokens that the loss counts; without data, all of them."""
    if data is None:
        return [], 1.0
    examples = _read(job, data, backend) if isinstance(data, Path) else data
    lengths = [len(example.ids) for example in examples]
    return lengths, sum(example.target_tokens for example in examples) / sum(lengths)


def _read(job: Job, data: Path, backend: Backend) -> list[Example]:
    file, tokenizer = own_data_file(data), backend.tokenizer(job.model.base)
    own = job.data
    return load_examples(file, tokenizer, own.sequence_length, skip_bad=own.skip_bad, balance=own.balance)[0]


def _case(job: Job, plan: Plan, question: _Question) -> Case:
    choices, base = plan.choices, job.model.base
    if base != DEMO and Path(base).is_dir():
        base = str(Path(base).absolute())
    examples = max(1, choices.tokens // choices.sequence_length)
    return Case(
        model=ModelSettings(base, job.model.quantization),
        adapter=AdapterSettings(choices.kind, choices.rank, job.adapter.alpha),
        choices=replace(choices, tokens=examples * choices.sequence_length),
        target_share=question.target_share,
        cores=int(question.machine.cores),
    )
