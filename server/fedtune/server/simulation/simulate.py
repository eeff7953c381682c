"""`fedtune simulate` and `fedtune resume`: a job, a grid in this process, and a run directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedtune.core.errors import JobError
from fedtune.core.fleet import load_fleet
from fedtune.core.job import BUNDLED, Job, secure_cohort_problems
from fedtune.demo import FLEET
from fedtune.model.examples import CleaningReport
from fedtune.model.shape import shape_of
from fedtune.server.display import Display, format_seconds
from fedtune.server.evaluator import ModelEvaluator
from fedtune.server.process import peak_rss_mb
from fedtune.server.run import Facts, run_rounds
from fedtune.server.run_directory import CLIENTS, RunDirectory
from fedtune.server.simulation.edge import check_export, export_and_answer
from fedtune.server.simulation.fleet import FleetGrid, SimulatedFleet, read_virtual
from fedtune.server.simulation.grid import RUN_ID, Executor, InProcessGrid
from fedtune.server.simulation.local import LocalExecutor
from fedtune.server.simulation.workshop import Workshop
from fedtune.strategies.secure import SecureAggregation
from fedtune.strategies.selection import cohort_size
from fedtune.strategies.strategy import AdapterStrategy, federation_from_job
from fedtune.strategies.tiering import Ranks

FIRST_NODE_ID = 1000
SIMULATION = "simulation"  # names the run in the memory of simulated clients, which ends with it
VIRTUAL = "virtual.jsonl"  # one object a round, where a fleet is simulated


def simulate(job: Job, path: Path, display: Display, *, force: bool = False) -> dict[str, Any]:
    """Runs a job from its beginning in a new run directory.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: the job, its data or its model cannot be used, or the directory is in the way; nothing was written.
        RunError: the run could not go on; it can be resumed.
    """
    workshop = _open(job, path, display)
    directory = RunDirectory.create(path, job, workshop.base.digest, force)
    try:
        summary = _run(workshop, directory, display)
    finally:
        directory.close()
    export_and_answer(job, path, summary, display)
    return summary


def resume(path: Path, display: Display) -> dict[str, Any]:
    """Goes on with an interrupted run; the result is the same, bit for bit, as an undisturbed run's."""
    directory = RunDirectory.open(path)
    try:
        job = directory.job()
        summary = _run(_open(job, path, display), directory, display)
    finally:
        directory.close()
    export_and_answer(job, path, summary, display)
    return summary


def _open(job: Job, path: Path, display: Display) -> Workshop:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    check_export(job)
    if job.simulation.fleet:
        load_fleet(_fleet_path(job))  # a mistake in it is told before anything is written
    workshop = Workshop(job, path / CLIENTS)
    clients = len(workshop.population.names)
    if job.secure_aggregation.enabled and (
        problems := secure_cohort_problems(job, cohort_size(job.federation.clients_per_round, clients))
    ):
        raise JobError(problems)
    model = workshop.model
    display.note(
        f"base {model.base.name} ({job.model.quantization}, {model.base.weights}, {model.base.precision}), "
        f"adapter of {model.layout.size:,} parameters, {clients} clients"
    )
    return workshop


def _run(workshop: Workshop, directory: RunDirectory, display: Display) -> dict[str, Any]:
    job = workshop.job
    clients = {FIRST_NODE_ID + index: name for index, name in enumerate(workshop.population.names)}
    nodes = {name: node_id for node_id, name in clients.items()}
    executor = _executor(workshop, clients)
    evaluator = ModelEvaluator(workshop.model, job.data)
    federation = federation_from_job(job, workshop.base, workshop.model.layout)
    grid = InProcessGrid(executor, list(clients))
    if job.simulation.fleet:
        devices = SimulatedFleet(job, load_fleet(_fleet_path(job)), list(nodes), shape_of(job.model))
        for refusal in devices.refusals.values():
            display.note(f"sits out: {refusal}")
        federation = replace(federation, selection=devices.selection(federation.selection))
        grid = FleetGrid(executor, list(clients), clients, devices, directory.path / VIRTUAL)
    secure = SecureAggregation(SIMULATION, workshop.enrolment.roster) if job.secure_aggregation.enabled else None
    strategy = AdapterStrategy(federation, lambda _: nodes, display.client, secure, _ranks(job, list(nodes)))
    summary: dict[str, Any] = {}
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        summary.update(run_rounds(strategy, directory, grid, evaluator, display, lambda: _facts(executor)))

    try:
        server_app(grid, Context(RUN_ID, 0, {}, RecordDict(), {}))
    finally:
        executor.close()
    if job.simulation.fleet:
        seconds = [line["seconds"] for line in read_virtual(directory.path / VIRTUAL)]
        display.note(f"virtual  {format_seconds(sum(seconds))} in {len(seconds)} rounds of the fleet")
    return summary


def _ranks(job: Job, names: Sequence[str]) -> Ranks | None:
    """What each client can train, where the job says so."""
    dealt = job.simulation.ranks
    if not dealt:
        return None
    return {name: dealt[index % len(dealt)] for index, name in enumerate(sorted(names))}.__getitem__


def _fleet_path(job: Job) -> Path:
    return FLEET if job.simulation.fleet == BUNDLED else Path(job.simulation.fleet)


def _facts(executor: Executor) -> Facts:
    reports = executor.workers()
    cleaning = {client: part for report in reports for client, part in report.cleaning.items()}
    records = sum(cleaning.values(), CleaningReport())
    return Facts(peak_rss_mb() + sum(report.peak_rss_mb for report in reports), asdict(records))


def _executor(workshop: Workshop, clients: dict[int, str]) -> Executor:
    if workshop.job.simulation.backend == "ray":
        from fedtune.server.simulation.ray_pool import RayExecutor

        return RayExecutor(workshop, clients)
    return LocalExecutor(workshop, clients)
