"""Checks of all user input, before a run begins and before torch is imported.

    inputs = check_simulation(job)       # raises InputError, or returns what the job's files hold

Each check uses the function with which the run itself reads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fedtune.core.errors import InputError, JobError
from fedtune.core.job.secure_cohorts import grouped_cohort_problems
from fedtune.core.job.settings import Job
from fedtune.core.privacy.budget import participation_problems
from fedtune.data.job_inputs import JobInputs, named_source, source_of
from fedtune.model.shape import adapted_modules
from fedtune.model.weight_headers import linear_layers
from fedtune.server.costs.power import check_energy
from fedtune.server.export.request import check_export
from fedtune.server.tracking.tracker_libraries import check_installed
from fedtune.strategies.cohorts.selection import cohort_size


def check_server_job(job: Job) -> JobInputs:
    """Reads the inputs that a server needs for a job; devices have their own data.

    Raises:
        InputError: the base model, the held-out examples, the export or a tracker cannot be used, or a budget has no
            meter.
    """
    check_export(job)
    check_installed(job.tracking.to)
    check_energy(job)
    inputs = JobInputs(job)
    inputs.check_server()
    _check_adapter(job)
    return inputs


def check_simulation(job: Job) -> JobInputs:
    """Reads all inputs that a simulation needs for a job.

    Raises:
        InputError: the first of `simulation_problems`.
    """
    inputs = JobInputs(job)
    for problem in simulation_problems(inputs):
        raise problem
    return inputs


def simulation_problems(inputs: JobInputs) -> Iterator[InputError]:
    """Yields the reasons why a simulation of a job cannot begin, from the job and its files alone: none when it can.

    The export, a tracker or the base model cannot be used; a budget of joules has no meter; the held-out examples, a
    training file or the fleet cannot be read; or they give fewer clients than the job asks for.
    """
    job = inputs.job
    checks: tuple[Callable[[], object], ...] = (
        lambda: check_export(job),
        lambda: check_installed(job.tracking.to),
        lambda: check_energy(job),
        lambda: source_of(job.model.base),
        lambda: _check_adapter(job),
        lambda: inputs.evaluation,
        lambda: inputs.fleet,
        lambda: _check_cohort(job, len(inputs.population.names)),
    )
    for check in checks:
        try:
            check()
        except InputError as problem:
            yield problem
    if job.federation.selection != "uniform" and not job.simulation.fleet:
        reason = "simulation.fleet names no fleet; there is one: --fleet bundled"
        yield JobError([f'federation.selection is "{job.federation.selection}", but {reason}'])


def _check_adapter(job: Job) -> None:
    """Checks, where the base's files tell it, that the adapter fits; once more with every base when it is loaded."""
    linear = linear_layers(Path(named_source(job.model.base)))
    if linear is not None:
        adapted_modules(linear, job.adapter)


def _check_cohort(job: Job, clients: int) -> None:
    cohort = cohort_size(job.federation.clients_per_round, clients)
    problems = grouped_cohort_problems(job, cohort) if job.secure_aggregation.enabled else []
    if problems := [*problems, *participation_problems(job, cohort, clients)]:
        raise JobError(problems)
