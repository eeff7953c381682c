"""`fedtune simulate` and `fedtune resume`: a job, a grid in this process, and a run directory.

Everything that a person may have mistyped is read first; torch, transformers and Flower are imported when all of it is
right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.core.job.settings import Job
from fedtune.server.preflight import check_simulation
from fedtune.server.run_directory import RunDirectory, check_free, is_finished
from fedtune.server.run_display import Display
from fedtune.server.simulation.edge_answers import export_and_answer


def simulate(job: Job, path: Path, display: Display, *, force: bool = False) -> dict[str, Any]:
    """Runs a job from its beginning in a new run directory.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: the job, its data or its model cannot be used, or the directory is in the way; nothing was written.
        RunError: the run could not go on; it can be resumed.
    """
    check_free(path, force)
    inputs = check_simulation(job)
    from fedtune.server.simulation.simulated_run import open_context, run_job

    context = open_context(inputs, path, display)
    directory = RunDirectory.create(path, job, context.base.digest, force)
    try:
        summary = run_job(context, directory, display)
    finally:
        directory.close()
    export_and_answer(job, path, summary, display)
    return summary


def resume(path: Path, display: Display) -> dict[str, Any]:
    """Goes on with an interrupted run; the result is the same, bit for bit, as an undisturbed run's."""
    directory = RunDirectory.open(path)
    try:
        job = directory.job()
        inputs = check_simulation(job)
        from fedtune.server.simulation.simulated_run import open_context, run_job

        if is_finished(path):
            display.note("all rounds are done already; only what follows from them is written again")
        summary = run_job(open_context(inputs, path, display), directory, display)
    finally:
        directory.close()
    export_and_answer(job, path, summary, display)
    return summary
