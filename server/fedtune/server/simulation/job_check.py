"""The check of a job before anything trains: what it would run on, what is wrong with it, and what it would take.

    found = check_job(Path("job.toml"))
    found.problems          # empty where the job can run
    found.to_json()

Mistakes in the job and its files are found first, without torch; only a job without any is measured further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.errors import DataError, InputError, JobError, MissingExtraError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import DEMO, DataSettings, Job
from fedtune.core.job.unusual import Surroundings, unusual
from fedtune.data.evaluation_match import mismatches
from fedtune.data.examples import Example, prepare
from fedtune.data.job_inputs import JobInputs, source_of
from fedtune.data.lengths import MOST_MEASURED, Lengths
from fedtune.data.population import Population, training_files
from fedtune.data.records import read_lines
from fedtune.server.preflight import simulation_problems
from fedtune.server.privacy_plan import plan_privacy
from fedtune.strategies.cohorts.selection import cohort_size
from fedtune.strategies.evaluation_round import scored_sets

if TYPE_CHECKING:
    from fedtune.client.plan.device_plan import Outcome

_NAMED = 5  # clients that a warning names


@dataclass(frozen=True)
class Prediction:
    """The memory and time that training takes on this machine.

    Args:
        client: the plan of the client with the most records.
        clients: number of clients in a round.
        together: number of them that this machine trains at a time.
        rounds: number of rounds.
    """

    client: Outcome
    clients: int
    together: int
    rounds: int

    @property
    def round_seconds(self) -> float:
        """Predicted seconds of the training in a round."""
        return self.client.training_seconds * -(-self.clients // self.together)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, in bytes and seconds."""
        return {
            "client": self.client.to_json(),
            "clients_per_round": self.clients,
            "at_a_time": self.together,
            "seconds_per_round": self.round_seconds,
            "seconds": self.round_seconds * self.rounds,
        }


@dataclass(frozen=True)
class Checked:
    """The findings about a job.

    Args:
        problems: sentences about everything that keeps the job from running.
        bad_lines: sentences about the lines of data files that are no record.
        warnings: sentences about what is allowed and unusual.
        clients: client -> number of its records.
        sequence_length: tokens to which the job cuts examples; None where the job itself is invalid.
        scores_from: the examples that scores would come from; None where the job itself is invalid.
        lengths: lengths of examples in tokens; None where there are problems.
        prediction: memory and time on this machine; None where there are problems, or no plan fits.
    """

    problems: Sequence[str]
    bad_lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    clients: dict[str, int] = dataclasses.field(default_factory=dict)
    sequence_length: int | None = None
    scores_from: str | None = None
    lengths: Lengths | None = None
    prediction: Prediction | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        lengths, prediction = self.lengths, self.prediction
        return {
            "can_run": not self.problems,
            "problems": list(self.problems),
            "bad_lines": list(self.bad_lines),
            "warnings": list(self.warnings),
            "clients": self.clients,
            "sequence_length": self.sequence_length,
            "scores_from": self.scores_from,
            "tokens": dataclasses.asdict(lengths) if lengths else None,
            "predicted": prediction.to_json() if prediction else None,
        }


def check_job(path: Path, overrides: Sequence[str] = ()) -> Checked:
    """Checks a job file and everything that it names, and measures what a simulation of it would take."""
    try:
        job = load_job(path, overrides)
    except JobError as error:
        return Checked(str(error).splitlines())
    unreadable, bad = _read_files(job)
    inputs = JobInputs(dataclasses.replace(job, data=dataclasses.replace(job.data, skip_bad=True)))
    problems = [line for problem in simulation_problems(inputs) for line in _sentences(problem, path)] + unreadable
    if bad and not job.data.skip_bad:
        remedy = "correct them, or set data.skip_bad = true to leave them out"
        problems.append(f"{path}: number of lines that are no record: {len(bad):,}; {remedy}")
    population = _population(inputs)
    counts = {name: len(population.records(name)) for name in population.names} if population else {}
    found = Checked(list(dict.fromkeys(problems)), bad, (), counts, job.data.sequence_length, scored_sets(job))
    if problems or population is None:
        return found
    try:
        return _measured(found, inputs, population)
    except ModuleNotFoundError as error:
        return _warned(found, str(MissingExtraError("a look at lengths, memory and time", "server", str(error.name))))
    except InputError as error:
        return dataclasses.replace(found, problems=_sentences(error, path))


def _sentences(problem: InputError, path: Path) -> list[str]:
    """Returns an error's sentences, each with its place; that of a job's problems is the job file."""
    return str(JobError(problem.problems, path) if isinstance(problem, JobError) else problem).splitlines()


def _read_files(job: Job) -> tuple[list[str], list[str]]:
    """Returns a sentence for each file that cannot be read, and one for each line of the others that is no record."""
    unreadable, bad = [], []
    for file in _files(job.data):
        try:
            bad += [str(line) for line in read_lines(file) if isinstance(line, DataError)]
        except DataError as error:
            unreadable.append(str(error))
    return unreadable, bad


def _files(data: DataSettings) -> list[Path]:
    try:
        training = training_files(data)
    except DataError:  # which the checks of the simulation report
        training = []
    return [*training, *([Path(data.evaluation)] if data.evaluation not in ("", DEMO) else [])]


def _population(inputs: JobInputs) -> Population | None:
    """Returns the clients; None where the checks of the simulation have reported why there are none."""
    try:
        return inputs.population
    except InputError:
        return None


def _measured(found: Checked, inputs: JobInputs, population: Population) -> Checked:
    """Adds lengths, warnings and the prediction to the findings about a job without problems.

    Raises:
        InputError: the base model cannot be used, or no example can.
        ModuleNotFoundError: the training library is not installed.
    """
    from fedtune.client.plan.planner import NoPlanError
    from fedtune.model.base_model import load_tokenizer, quiet
    from fedtune.model.shape import layout_of_sizes, shape_of

    job = inputs.job
    with quiet():
        tokenizer = load_tokenizer(source_of(job.model.base))
    shape = shape_of(job.model)
    layout, clients = layout_of_sizes(shape.linear, job.adapter), len(population.names)
    noise = plan_privacy(job, layout, clients).advice if job.privacy.mode != "off" else ()
    lengths = Lengths.of(population, tokenizer, job.data.sequence_length)
    evaluation, report = prepare(inputs.evaluation, tokenizer, job.data.sequence_length)
    for source, cleaned in (("data.train", lengths.cleaning), ("data.evaluation", report)):
        if cleaned.read and not cleaned.kept:
            longest = f"at most {job.data.sequence_length} tokens are allowed (data.sequence_length)"
            raise JobError([f"{source} has no usable example ({cleaned}); {longest}"])
    tokens = sum(len(example.ids) for example in evaluation) / len(evaluation) if evaluation else None
    known = Surroundings(shape.width, shape.positions, len(evaluation), tokens, clients)
    warnings = [*noise, *unusual(job, known), *mismatches(population.sample(), inputs.evaluation)]
    if lengths.unusable:
        names = ", ".join(lengths.unusable[:_NAMED]) + (", …" if len(lengths.unusable) > _NAMED else "")
        warnings.append(f"clients without a usable example, which drop out of every round: {names}")
    largest = max(found.clients, key=found.clients.__getitem__)
    examples = prepare(population.records(largest)[:MOST_MEASURED], tokenizer, job.data.sequence_length)[0]
    found = dataclasses.replace(found, lengths=lengths, warnings=warnings)
    try:
        return dataclasses.replace(found, prediction=_predict(job, examples, clients))
    except NoPlanError as error:
        return _warned(found, str(error))


def _predict(job: Job, examples: Sequence[Example], clients: int) -> Prediction:
    """Plans for a client with these examples, without a trial step.

    Raises:
        NoPlanError: no plan fits this machine.
    """
    from fedtune.client.plan.calibration import CalibrationStore
    from fedtune.client.plan.device_plan import default_folder, this_device

    planner = this_device(CalibrationStore(default_folder()), lambda _: None)
    outcome = planner.plan(job, examples or None, trial="never")
    cohort = cohort_size(job.federation.clients_per_round, clients)
    places = len(outcome.machine.gpus) or int(outcome.machine.cores)
    workers = places if job.simulation.workers == "auto" else job.simulation.workers
    return Prediction(outcome, cohort, max(1, min(workers, places, cohort)), job.federation.rounds)


def _warned(found: Checked, warning: str) -> Checked:
    return dataclasses.replace(found, warnings=[*found.warnings, warning])
