"""The `fedtune server` commands about jobs. They read and write files, so they work whether the server runs or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.server.server_options import AsJson, Home, open_server

if TYPE_CHECKING:  # the class itself is imported when a command runs
    from fedtune.server.live.server_home import ServerHome

LOOK_SECONDS = 0.2  # between two looks at a log that is followed
LAST_LINE_SECONDS = 1.0  # the time after which the server has written the last line about a job that left the queue

JobName = Annotated[str, typer.Argument(metavar="NAME", help="The job's name, as fedtune server jobs lists it.")]


def jobs(as_json: AsJson = False, home: Home = None) -> None:
    """List all jobs: waiting, running, finished, failed and cancelled.

    Each has its number, the rounds that are done, when it was submitted, how long it took, and its last score.

    Example: fedtune server jobs --json
    """
    from rich.console import Console

    from fedtune.server.live.job_history import all_jobs, print_jobs
    from fedtune.server.live.job_queue import Jobs

    server = open_server(home)
    records = all_jobs(Jobs(server), _current(server))
    if as_json:
        print(json.dumps([record.to_json() for record in records], indent=2))
    else:
        print_jobs(Console(highlight=False), records)


def show(name: JobName, as_json: AsJson = False, home: Home = None) -> None:
    """Show one job: its state and times, its last rounds and costs, its reason if it failed, and what can be done next.

    Example: fedtune server show demo-1
    """
    from rich.console import Console

    from fedtune.server.live.job_history import costs_of, one_job, print_job
    from fedtune.server.live.job_queue import Jobs

    server = open_server(home)
    record = one_job(Jobs(server), name, _current(server))
    if as_json:
        print(json.dumps(record.to_json() | {"costs": costs_of(record)}, indent=2))
    else:
        print_job(Console(highlight=False), record)


def cancel(name: JobName, home: Home = None) -> None:
    """Cancel a job: one that waits leaves the queue, the running one ends within its round.

    The result of its rounds stays: the server writes adapter, summary and report of those that are done, and fetch
    copies them. A job that is exporting has trained all its rounds, and goes on. To run a cancelled job again, submit
    it with another number: --set federation.run=2.

    Example: fedtune server cancel demo-1
    """
    from fedtune.server.live.job_history import has_rounds, how_far
    from fedtune.server.live.job_queue import Jobs

    server = open_server(home)
    queue = Jobs(server)
    job = queue.cancel(name)  # before the server is looked for: one that starts now finds it
    if server.lock.holder() is not None:
        print(f"{name}: the server ends it now; see fedtune server show {name}")
    elif has_rounds(queue, job):
        print(f"{name}: {how_far(queue, job)}; the server writes its adapter when it starts again")
    else:
        reason = how_far(queue, job)
        queue.set_aside(job, reason)
        print(f"{name}: {reason}")


def logs(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A job's name; without one, the server's own log.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines, until the job ends or Ctrl-C.")
    ] = False,
    home: Home = None,
) -> None:
    """Print what the server said about a job, or about everything: the lines of its standard output, with their times.

    Of each log the last four megabytes are kept.

    Example: fedtune server logs demo-1 --follow
    """
    import time
    from contextlib import suppress

    from fedtune.server.live.job_queue import WAITING, Jobs
    from fedtune.server.live.log_files import job_log, read_log, server_log

    server = open_server(home)
    queue = Jobs(server)
    path = job_log(server, queue.find(name)[1]) if name else server_log(server)

    def ended() -> bool:
        if follow and (name is None or queue.find(name)[0] == WAITING):
            return False
        if follow:
            time.sleep(LAST_LINE_SECONDS)
        return True

    with suppress(KeyboardInterrupt):
        empty = True
        for line in read_log(path, ended, lambda: time.sleep(LOOK_SECONDS)):
            print(line, flush=follow)
            empty = False
        if empty:
            print(f"no line yet: the log of {name or 'the server'} begins with its work")


def fetch(
    name: JobName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make for the copies.")],
    home: Home = None,
) -> None:
    """Copy the results of a finished or cancelled job: adapter, report, rounds, summary, job file, exported models.

    Every digest is checked. If anything is missing or changed, nothing is copied, and each such file is named.

    Example: fedtune server fetch demo-1 --out results/demo-1
    """
    from fedtune.core.errors import InputError
    from fedtune.server.live.job_history import one_job
    from fedtune.server.live.job_queue import Jobs
    from fedtune.server.run_results import fetch_results

    server = open_server(home)
    record = one_job(Jobs(server), name, _current(server))
    if record.state in ("waiting", "running", "ending"):
        raise InputError(
            f"{name}: this job is {record.state}; fetch it when it has ended: fedtune server logs {name} -f"
        )
    if not record.rounds_done:
        because = f" ({record.reason})" if record.reason else ""
        raise InputError(f"{name}: this job is {record.state} and has no round{because}; there is nothing to fetch")
    for path in fetch_results(Path(record.run), out):
        print(path)


def _current(server: ServerHome) -> str | None:
    """Returns the name of the job that the running server works on."""
    from fedtune.server.live.status_board import read_status

    job = read_status(server)["job"]
    return str(job["name"]) if job else None
