"""`fedtune plan`: what this device would train under, and how true that is.

outcome = make_plan(job, data=Path("mine.jsonl"))
print(outcome.to_json())
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
import torch

from fedtune.client.plan.machine import Machine, probe
from fedtune.client.plan.memory import Choices, kappa_of, predict_memory
from fedtune.client.plan.planner import RESERVE, Constraints, NoPlanError, Plan, choose, longest_example
from fedtune.client.torch.calibration import Calibration, CalibrationStore, Case, Measured, measure
from fedtune.client.torch.seconds import product_rate, step_seconds
from fedtune.core.errors import DataError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import DEFAULT_LOCAL_STEPS, DEMO, Job, TrainingSettings
from fedtune.data.examples import load_examples
from fedtune.demo import JOB
from fedtune.model.base_model import best_precision, load_tokenizer, quiet, source_of
from fedtune.model.nf4 import bitsandbytes_works
from fedtune.model.shape import ModelShape, shape_of

ROOMY = 2.0  # a prediction is off by less: where so many times as much may be used, no real step would change the plan
_ATTEMPTS = 2  # a first real step may show that the plan was too bold

Trial = Literal["always", "where tight", "never"]


@dataclass(frozen=True)
class Link:
    """What is known of the line to the server: bytes a second and seconds, or None."""

    up: float | None = None
    down: float | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A plan with its prediction, and what one real step took.

    Args:
        local_steps: of a round.
        seconds_per_step: predicted, of an optimizer step.
        seconds_per_round: predicted; the line counts where its speed is known.
        kappa: the correction the prediction was made with; 1 on a device that has never measured.
        measured: None where no step was tried.
        predicted_measured: what the plan said of the very step that was measured, peak and seconds.
    """

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
        """Predicted, of a round, without the line."""
        return self.local_steps * self.seconds_per_step

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes and seconds."""
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
                "weights": choices.weights,
                "precision": choices.precision,
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


def make_plan(
    job: Job,
    data: Path | None = None,
    *,
    link: Link | None = None,
    memory: int | None = None,
    trial: Trial = "always",
    runtime: int | None = None,
    store: CalibrationStore | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Probes this device and plans for it.

    Args:
        job: base model, rank, batch and steps.
        data: a file of this device's examples; its lengths decide the sequence length.
        link: the line to the server.
        memory: bytes to plan for instead of what is free now.
        trial: when to try one real step, correct the plan by it and remember κ; "where tight" is once a model, and
            only where it could change the plan.
        runtime: bytes that this process takes without a model; None where it holds none now.
        store: where κ is remembered.
        note: told what is going on.

    Raises:
        NoPlanError: nothing fits; the message has the numbers.
        DataError, ModelError: the data or the model cannot be used.
        RunError: the real step failed.
    """
    link, store = link or Link(), store or CalibrationStore(default_folder())
    shape = shape_of(job.model)
    lengths, target_share = _lengths(job, data)
    machine = probe()
    device = torch.device("cuda" if machine.gpus else "cpu")
    own = int(psutil.Process().memory_info().rss)
    constraints = Constraints(
        quantization=job.model.quantization,
        precision=best_precision(device) if job.training.precision == "auto" else job.training.precision,
        rank=job.adapter.rank,
        sequence_length=job.data.sequence_length,
        longest=longest_example(lengths, job.data.sequence_length),
        batch_tokens=job.training.batch_tokens,
        local_steps=_local_steps(job.training, lengths),
        deadline=link.deadline,
        bandwidth_up=link.up,
        bandwidth_down=link.down,
        cuda=device.type == "cuda",
        weights=job.training.weights,
        checkpointing=job.training.gradient_checkpointing,
    )
    runtime = own if runtime is None else runtime
    if device.type == "cuda":
        budget = round((memory or machine.gpus[0].free + torch.cuda.memory_reserved()) * (1 - RESERVE))
    else:  # this process already holds the libraries that the training process will hold
        budget = round((memory or machine.memory_free + own) * (1 - RESERVE)) - runtime
    known: Calibration | None = None
    measured: Measured | None = None
    foretold: tuple[int, float] | None = None
    for attempt in range(1 if trial == "never" else _ATTEMPTS):
        kappa = known.kappa if known else 1.0
        plan = choose(shape, constraints, budget, target_share=target_share, kappa=kappa)
        key = calibration_key(machine, shape, plan)
        if known is None and (known := store.get(key)):
            kappa = known.kappa
            plan = choose(shape, constraints, budget, target_share=target_share, kappa=kappa)
        tight = known is None and plan.memory.peak * ROOMY > budget
        if trial == "never" or (trial == "where tight" and not tight) or (measured and measured.peak <= budget):
            break
        case = _case(job, plan, device, target_share)
        tried = replace(plan.choices, tokens=case.micro_batch * case.sequence_length)
        seconds = _seconds(shape, tried, device, known, target_share)
        foretold = (predict_memory(shape, tried, target_share=target_share, kappa=kappa).peak, seconds)
        note(f"trying one step of {case.micro_batch} × {case.sequence_length} tokens")
        measured = measure(case)
        known = Calibration(
            kappa_of(shape, tried, measured.training, target_share=target_share),
            measured.step_seconds / measured.tokens,
        )
        store.keep(calibration_key(machine, shape, plan), known)
        if measured.peak <= budget:
            break
        if attempt + 1 < _ATTEMPTS:
            note("it took more than predicted; planning anew")
    per_step = _seconds(shape, plan.choices, device, known, target_share) * plan.accumulation
    sending = plan.bytes_up / link.up if link.up else 0.0
    receiving = plan.bytes_down / link.down if link.down else 0.0
    return Outcome(
        machine=machine,
        shape=shape,
        plan=plan,
        runtime=runtime,
        native_unpacking=bitsandbytes_works(device.type),
        target_share=target_share,
        local_steps=constraints.local_steps,
        seconds_per_step=per_step,
        seconds_per_round=per_step * constraints.local_steps + sending + receiving,
        kappa=kappa,
        measured=measured,
        predicted_measured=foretold,
    )


def plan_bases(
    bases: Sequence[Path], data: Path, calibrations: Path, trial: Trial, note: Callable[[str], None]
) -> list[Outcome]:
    """Plans for each base model that a device brings, or for the bundled one, before any job is known.

    Rank, batch and lengths are those of a job that says nothing of them.

    Raises:
        NoPlanError: none of them fits; the message has the numbers of each.
        DataError, ModelError, RunError: as `make_plan`.
    """
    plans, refusals = [], []
    for base in [str(path.absolute()) for path in bases] or [DEMO]:
        job = load_job(JOB) if base == DEMO else Job()
        job = replace(job, model=replace(job.model, base=base), data=replace(job.data, skip_bad=True))
        try:
            plans.append(make_plan(job, data, trial=trial, store=CalibrationStore(calibrations), note=note))
        except NoPlanError as error:
            refusals.append(f"{base}: {error}")
            note(refusals[-1])
    if not plans:
        raise NoPlanError("\n".join(refusals))
    return plans


def default_folder() -> Path:
    """Where this device remembers its calibrations."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fedtune" / "calibration"


def calibration_key(machine: Machine, shape: ModelShape, plan: Plan) -> str:
    """What a calibration holds for: this device, this model's sizes, and the format of the plan."""
    gpu = machine.gpus[0].name if machine.gpus else ""
    sizes = hashlib.sha256(repr(replace(shape, name="", file_bytes=0)).encode()).hexdigest()
    choices = plan.choices
    form = f"{choices.weights} {choices.precision} {choices.checkpointing}"
    return f"{machine.processor}|{machine.cores}|{machine.memory_total}|{gpu}|{sizes}|{form}"


def _seconds(
    shape: ModelShape, choices: Choices, device: torch.device, known: Calibration | None, target_share: float
) -> float:
    """Of a micro-batch."""
    if known:
        return known.seconds_per_token * choices.tokens
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the training process has it
    try:
        return step_seconds(shape, choices, product_rate(shape, choices, device), choices.tokens, target_share)
    finally:
        torch.set_num_threads(threads)


def _local_steps(training: TrainingSettings, lengths: Sequence[int]) -> int:
    """Optimizer steps a round; for a job that counts epochs, about as many as this data makes."""
    if training.local_epochs is None:
        return training.local_steps or DEFAULT_LOCAL_STEPS
    return max(1, round(training.local_epochs * -(-sum(lengths) // training.batch_tokens)))


def _lengths(job: Job, data: Path | None) -> tuple[list[int], float]:
    """Token counts of the examples, and the share of tokens that the loss counts; without data, all of them."""
    if data is None:
        return [], 1.0
    if not data.is_file():
        raise DataError(data, "no such file; expected one with this device's examples")
    with quiet():
        tokenizer = load_tokenizer(source_of(job.model.base))
    examples, _ = load_examples(data, tokenizer, job.data.sequence_length, skip_bad=job.data.skip_bad)
    lengths = [len(example.ids) for example in examples]
    return lengths, sum(example.target_tokens for example in examples) / sum(lengths)


def _case(job: Job, plan: Plan, device: torch.device, target_share: float) -> Case:
    choices = plan.choices
    base = job.model.base
    return Case(
        base=base if base == DEMO or not Path(base).is_dir() else str(Path(base).absolute()),
        quantization=job.model.quantization,
        weights=choices.weights,
        precision=choices.precision,
        rank=choices.rank,
        alpha=job.adapter.alpha,
        sequence_length=choices.sequence_length,
        micro_batch=max(1, choices.tokens // choices.sequence_length),
        checkpointing=choices.checkpointing,
        target_share=target_share,
        device=device.type,
    )
