"""A live device's work under its plan: planning for a job, loading its model, and measuring its training.

    work = PlannedWork(bases, data, planner)
    outcome = work.take_on(terms)           # at the registration; NoPlanError with the numbers where nothing fits
    trainer = work.open_trainer(base)       # when the first round asks for it, and within the plan
    with work.watched(): ...                # around a round's training

With enough memory the device computes exactly as in a simulation of the job, bit for bit. With less, it splits steps
into micro-batches, holds the base packed, recomputes activations or, as the last resort, cuts examples shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.client.plan.backend import Backend, LimitedTrainer, Meter, WrongBaseError
from fedtune.client.plan.calibration import LIKELY_KAPPA, Calibration
from fedtune.client.plan.device_plan import DevicePlanner, Link, Outcome, Trial, calibration_key
from fedtune.client.plan.planner import NoPlanError, megabytes
from fedtune.client.plan.step_costs import Choices, kappa_of
from fedtune.client.trainer import Limits, Trainer
from fedtune.core.errors import FedtuneError, ModelError, PeerError, RunError
from fedtune.core.job.settings import DEMO, AdapterSettings, Job, ModelSettings
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base, TrainRequest
from fedtune.core.round_timing import done_share
from fedtune.data.examples import Example, load_examples
from fedtune.data.job_inputs import is_pack
from fedtune.edge.pack_facts import read_facts


@dataclass(frozen=True)
class Took:
    """Measurements of the training under a plan.

    Args:
        rounds: number of rounds trained.
        peak_bytes: highest peak of any round, loading included, over the program itself; None if not measurable.
        seconds: duration of the last round.
    """

    rounds: int = 0
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class _Held:
    """The base model in memory: the directory it came from, and the choices of its plan."""

    source: str
    base: Base
    trainer: LimitedTrainer
    choices: Choices


class _Gauge:
    """Measures the peak of this process's memory over the program itself, where the system permits it."""

    def __init__(self) -> None:
        self._meter: Meter | None = None
        self.runtime: int | None = None
        """Bytes of the process before it loaded the model."""

    def begin(self, backend: Backend) -> int | None:
        """Begins to measure before a model is loaded; returns the bytes of the process, or None where they cannot be
        measured."""
        try:
            self._meter = backend.meter()
            return self._meter.reset()
        except (OSError, RunError):  # /proc is missing or read-only
            self._meter = None
            return None

    def reset(self) -> None:
        """Resets the peak."""
        if self._meter is not None:
            with suppress(OSError, RunError):
                self._meter.reset()

    def peak(self) -> int | None:
        """Returns the peak since the reset, over the program itself."""
        if self._meter is None or self.runtime is None:
            return None
        try:
            return self._meter.peak() - self.runtime
        except (OSError, RunError):
            return None


class PlannedWork:
    """The base models and the data of a device, used as its plan says.

    Args:
        bases: model directories and edge packs of this device; a job's base is found among them by its digest.
        data: this device's examples.
        planner: plans for this device; its backends open the models, and its note receives messages about the progress.
    """

    def __init__(self, bases: Sequence[Path], data: Path, planner: DevicePlanner) -> None:
        self._bases, self._data, self._planner = bases, data, planner
        self._terms: JobTerms | None = None
        self._plans: dict[str, Outcome | NoPlanError] = {}
        self._source = ""  # the directory whose plan is in force: that of the base in memory, or the likeliest one
        self._held: _Held | None = None
        self._gauge = _Gauge()
        self._preparing = 0.0
        self._warm: set[str] = set()  # names of the backends that have been warmed up
        self.took = Took()
        self.uplink: float | None = None
        """The last measured upload rate, bytes a second; None where it is unknown."""

    @property
    def terms(self) -> JobTerms | None:
        """The terms of the job that the device works for."""
        return self._terms

    @property
    def must_reload(self) -> bool:
        """True if the model in memory has the right base but another form than the plan's, or another directory."""
        held = self._held
        if held is None or self._terms is None or held.base != self._terms.base:
            return False
        planned = self._plans.get(self._source)
        if not isinstance(planned, Outcome):
            return False
        return held.source != self._source or not _same_form(held.choices, planned.plan.choices)

    def take_on(self, terms: JobTerms) -> Outcome:
        """Plans for a job. Equal terms keep their plan, and are planned again only where nothing fitted.

        Raises:
            NoPlanError: nothing fits; the message has the numbers.
            ModelError: this device has no base model that the job could mean.
            DataError: its data cannot be used.
        """
        if terms != self._terms:
            self._terms, self._plans, self.took = terms, {}, Took()
        self._plans = {source: plan for source, plan in self._plans.items() if isinstance(plan, Outcome)}
        refusal: FedtuneError | None = None
        for source in self._sources(terms.base):
            self._source = source
            try:
                outcome = self._plan(source)
            except (NoPlanError, ModelError) as error:
                refusal = error
                continue
            if self._held and self._held.source == source:
                self._held.trainer.limits = _limits(outcome)
            return outcome
        self.uplink = None  # measured again, so that one slow upload does not rule the device out for good
        raise refusal or self._no_base(terms.base, [])

    def open_trainer(self, base: Base) -> LimitedTrainer:
        """Opens the model with the digest that the server names, from a directory of this device.

        The path in the request is never opened.

        Raises:
            PeerError: it is not the base that was planned for.
            ModelError: no directory holds it, or the one that does is damaged.
            NoPlanError: it does not fit.
        """
        if self._terms is None or base != self._terms.base:
            raise PeerError("asked for another base model or adapter than at the registration")
        self._held = None  # free the old one before the new one is loaded
        start, found = time.monotonic(), []
        refusal: FedtuneError | None = None
        for source in self._sources(base):
            try:
                outcome = self._plan(source)
            except (NoPlanError, ModelError) as error:
                refusal = error
                continue
            backend = self._planner.backends.of(source)
            choices, runtime = outcome.plan.choices, self._gauge.begin(backend)
            settings = ModelSettings(source, base.quantization)
            try:
                trainer = backend.open(settings, _adapter(base), choices, base.digest)
            except WrongBaseError as error:
                found.append(f"{source} (digest {error.digest[:16]}…)")
                continue
            except ModelError as error:  # a damaged one; another may be whole
                self._planner.note(str(error))
                refusal = error
                continue
            trainer.limits = _limits(outcome)
            self._held, self._source, self._gauge.runtime = _Held(source, base, trainer, choices), source, runtime
            self._look()
            self._preparing += time.monotonic() - start
            return trainer
        raise refusal or self._no_base(base, found)

    def load_examples(self, client: str, trainer: Trainer, sequence_length: int) -> list[Example]:
        """Returns this device's examples, cut to the plan's length."""
        del client  # a device has one client
        start = time.monotonic()
        length = min(sequence_length, self._current().plan.sequence_length)
        balance = self._terms.job.data.balance if self._terms else None
        examples, report = load_examples(self._data, trainer.tokenizer, length, skip_bad=True, balance=balance)
        self._planner.note(f"data: {report}")
        self._preparing += time.monotonic() - start
        return examples

    def share(self, client: str, request: TrainRequest) -> float:
        """Returns the share of the requested work that the plan predicts to be done by the deadline."""
        del client
        return done_share(self._current().seconds_per_round, request.work.deadline or None)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Measures a round's training, and plans again if it took more memory than allowed.

        Raises:
            NoPlanError: an earlier round took more memory than any plan allows.
        """
        if self._held is not None:
            self._current()
            self._gauge.reset()
        self._preparing, start = 0.0, time.monotonic()
        yield
        seconds = time.monotonic() - start - self._preparing
        self.took = replace(self.took, rounds=self.took.rounds + 1, seconds=seconds)
        self._look()
        outcome = self._current()
        if self.took.peak_bytes is not None and self.took.peak_bytes > outcome.plan.budget:
            self._plan_again(outcome, self.took.peak_bytes, seconds)

    def to_json(self) -> dict[str, Any] | None:
        """Returns the plan, with measured beside predicted values; None before there is a plan."""
        outcome = self._plans.get(self._source)
        if not isinstance(outcome, Outcome):
            return None
        took = asdict(self.took) | {
            "predicted_peak_bytes": outcome.plan.memory.peak,
            "predicted_seconds": outcome.training_seconds,
        }
        return outcome.to_json() | {"took": took}

    def _current(self) -> Outcome:
        if self._terms is None:
            raise PeerError("this device has not been registered")
        return self._plan(self._source)

    def _plan(self, source: str) -> Outcome:
        if source not in self._plans:
            assert self._terms is not None
            job = _job(self._terms, source)
            self._warm_up(source)
            try:
                self._plans[source] = self._make(job)
            except NoPlanError as error:
                self._plans[source] = error
        planned = self._plans[source]
        if isinstance(planned, NoPlanError):
            raise planned
        return planned

    def _make(self, job: Job, trial: Trial = "where tight") -> Outcome:
        assert self._terms is not None
        deadline = self._terms.job.federation.deadline
        link = Link(up=self.uplink, deadline=None if deadline == "auto" else deadline)
        runtime = self._gauge.runtime if self._held else None
        try:
            return self._planner.plan(job, self._data, link, trial, runtime=runtime)
        except RunError as error:  # this process and the trial step's do not fit in memory together
            self._planner.note(f"{error}; using the prediction")
            return self._planner.plan(job, self._data, link, "never", runtime=runtime)

    def _plan_again(self, outcome: Outcome, peak: int, seconds: float) -> None:
        """Corrects this device's κ by a round that exceeded its budget, and tightens the limits of the next."""
        plan, choices = outcome.plan, outcome.plan.choices
        self._planner.note(f"training took {megabytes(peak)}, and {megabytes(plan.budget)} may be used; planning again")
        assert self._held is not None
        assert self._terms is not None
        held = self._held
        kappa = kappa_of(outcome.shape, choices, peak, target_share=outcome.target_share)
        tokens = outcome.local_steps * plan.accumulation * choices.tokens
        corrected = Calibration(min(max(kappa, outcome.kappa), LIKELY_KAPPA[1]), seconds / tokens, choices.threads)
        self._planner.store.keep(calibration_key(outcome.machine, outcome.shape, plan), corrected)
        job, form = _job(self._terms, held.source), held.choices
        training = replace(job.training, precision=form.precision)
        if form.weights == "packed" or form.weights == "dequantized":  # a pack in another form is soon open again
            training = replace(training, weights=form.weights)
        job = replace(job, training=training)
        self.took = replace(self.took, peak_bytes=None)
        try:
            replanned = self._make(job, "never")
        except NoPlanError as error:
            self._plans[held.source] = error
            return
        if replanned.plan.sequence_length < plan.sequence_length:  # too late: the examples are cut already
            numbers = f"it takes {megabytes(peak)}, and {megabytes(replanned.plan.budget)} may be used"
            self._plans[held.source] = NoPlanError(f"training does not fit this device: {numbers}")
            return
        self._plans[held.source], held.trainer.limits = replanned, _limits(replanned)

    def _warm_up(self, source: str) -> None:
        """Warms a backend up once, so that its memory counts as the program's own, as it does where κ is measured."""
        backend = self._planner.backends.of(source)
        if backend.name not in self._warm:
            backend.warm_up()
            self._warm.add(backend.name)

    def _sources(self, base: Base) -> list[str]:
        """Returns those of this device's base models that may be the job's and that it can train, the likeliest first:
        a directory of the right name, then packs of the right digest, then other directories.

        Raises:
            MissingExtraError: there are some, and it lacks the library for each of them.
        """
        held = self._held.source if self._held and self._held.base == base else ""
        packs = [path for path, digest in self._packs().items() if digest == base.digest]
        directories = [DEMO] if base.name == DEMO else [str(path) for path in self._bases if not is_pack(path)]
        named = [path for path in directories if Path(path).name == Path(base.name).name]
        likely = list(dict.fromkeys([held, *named, *packs, *directories]))
        found = [path for path in likely if path in packs or path in directories]
        usable = [path for path in found if self._planner.backends.installed(path)]
        if found and not usable:
            self._planner.backends.of(found[0])  # raises
        return usable

    def _packs(self) -> dict[str, str]:
        """Returns path -> its base's digest of this device's edge packs; a damaged one has none."""
        found = {}
        for path in filter(is_pack, self._bases):
            try:
                found[str(path)] = read_facts(path).base_digest
            except ModelError as error:
                self._planner.note(str(error))
                found[str(path)] = ""
        return found

    def _no_base(self, base: Base, others: list[str]) -> ModelError:
        """Returns the error of a device without the base; `others` are the directories that hold another one."""
        packs = [f"{path} (digest {digest[:16]}…)" for path, digest in self._packs().items() if digest != base.digest]
        return ModelError(
            f"the job is for the base model {base.name} with digest {base.digest[:16]}…; this device has "
            f"{', '.join([*others, *packs]) or 'none'}. Join with --base DIR for the directory that holds it"
        )

    def _look(self) -> None:
        """Updates the highest peak by the one since the reset."""
        if (peak := self._gauge.peak()) is not None:
            self.took = replace(self.took, peak_bytes=max(self.took.peak_bytes or 0, peak))


def _job(terms: JobTerms, source: str) -> Job:
    """Returns the job on the base in a directory of this device."""
    job = terms.job
    model = ModelSettings(source, terms.base.quantization)
    return replace(job, model=model, data=replace(job.data, skip_bad=True))


def _adapter(base: Base) -> AdapterSettings:
    targets = base.target_modules
    return AdapterSettings(base.kind, base.rank, base.alpha, "all-linear" if targets == ("all-linear",) else targets)


def _limits(outcome: Outcome) -> Limits:
    choices = outcome.plan.choices
    return Limits(choices.tokens, choices.checkpointing)


def _same_form(held: Choices, planned: Choices) -> bool:
    """Returns whether a plan holds the base in the form that is in memory, opened for as many threads."""
    return (held.weights, held.precision, held.threads) == (planned.weights, planned.precision, planned.threads)
