"""Checks of all user input, before a run begins and before torch is imported.

    inputs = check_simulation(job)       # raises InputError, or returns what the job's files hold

Each check uses the function with which the run itself reads the file.
"""

from __future__ import annotations

from fedtune.core.errors import JobError
from fedtune.core.job.secure_cohorts import grouped_cohort_problems
from fedtune.core.job.settings import Job
from fedtune.data.job_inputs import JobInputs
from fedtune.server.export.request import check_export
from fedtune.strategies.cohorts.selection import cohort_size


def check_server_job(job: Job) -> JobInputs:
    """Reads the inputs that a server needs for a job; devices have their own data.

    Raises:
        InputError: the base model, the held-out examples or the export cannot be used.
    """
    check_export(job)
    inputs = JobInputs(job)
    inputs.check_server()
    return inputs


def check_simulation(job: Job) -> JobInputs:
    """Reads all inputs that a simulation needs for a job.

    Raises:
        InputError: see `check_server_job`; or a training file or the fleet cannot be read; or they give fewer clients
            than the job asks for.
    """
    inputs = check_server_job(job)
    fleet, clients = inputs.fleet, len(inputs.population.names)
    wanted, selection = job.federation.clients_per_round, job.federation.selection
    if job.secure_aggregation.enabled and (problems := grouped_cohort_problems(job, cohort_size(wanted, clients))):
        raise JobError(problems)
    if selection != "uniform" and fleet is None:
        reason = "simulation.fleet names no fleet; there is one: --fleet bundled"
        raise JobError([f'federation.selection is "{selection}", but {reason}'])
    return inputs
