"""`fedtune track`: sends a run's records to trackers from its files, also long after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from fedtune.core.errors import InputError, RunError


def track(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="TRACKER",
            help="tensorboard, mlflow or wandb; by default the job's tracking.to; may be given again.",
        ),
    ] = None,
) -> None:
    """Send a run's settings, rounds and summary to experiment trackers, as far as they do not have them yet.

    A job whose tracking.to names trackers does so by itself while it runs; this is for trackers that were down
    meanwhile, and for runs without. Examples:

        fedtune track runs/demo-1

        fedtune track runs/demo-1 --to tensorboard --to mlflow
    """
    from fedtune.core.job.job_file import recorded_job
    from fedtune.core.job.settings import TrackerName
    from fedtune.server.run_directory import JOB, RunDirectory
    from fedtune.server.tracking.tracker_libraries import check_installed
    from fedtune.server.tracking.tracker_process import Follower

    known = get_args(TrackerName)
    if unknown := [name for name in to or [] if name not in known]:
        raise InputError(f"--to {unknown[0]}: unknown; expected some of {', '.join(known)}")
    directory = RunDirectory.open(run_directory)  # so that no process works on the run meanwhile
    try:
        names = [cast(TrackerName, name) for name in to or recorded_job(run_directory / JOB).tracking.to]
        if not names:
            raise InputError(f"{run_directory}: its job names no tracker; expected some of {', '.join(known)} as --to")
        check_installed(names)
        if failed := [name for name in dict.fromkeys(names) if not Follower(run_directory, name, print).finish()]:
            raise RunError(f"{run_directory}: not sent to {', '.join(failed)}; the run itself is whole")
    finally:
        directory.close()
