"""`fedtune simulate` and `fedtune resume`: a job, a grid in this process, and a run directory."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.core.errors import JobError
from fedtune.core.job.contradictions import secure_cohort_problems
from fedtune.core.job.settings import Job
from fedtune.data.examples import CleaningReport
from fedtune.flower.in_process_grid import InProcessGrid
from fedtune.flower.strategy import AdapterStrategy
from fedtune.server.export.last_step import check_export
from fedtune.server.run_directory import CLIENTS, VIRTUAL, RunDirectory, is_finished, read_virtual
from fedtune.server.run_display import Display, format_seconds
from fedtune.server.run_facts import peak_rss_mb
from fedtune.server.run_rounds import Facts, run_rounds
from fedtune.server.simulation.edge_answers import export_and_answer
from fedtune.server.simulation.executors import ForkedExecutor, LocalExecutor, WorkerPool
from fedtune.server.simulation.simulated_fleet import VirtualRounds
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.server.simulation.workers import worker_count
from fedtune.strategies.assembly import assemble
from fedtune.strategies.cohorts.selection import cohort_size
from fedtune.strategies.secure_sum import SecureAggregation

FIRST_NODE_ID = 1000
SIMULATION = "simulation"  # names the run in the memory of simulated clients, which ends with it


def simulate(job: Job, path: Path, display: Display, *, force: bool = False) -> dict[str, Any]:
    """Runs a job from its beginning in a new run directory.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: the job, its data or its model cannot be used, or the directory is in the way; nothing was written.
        RunError: the run could not go on; it can be resumed.
    """
    simulation_context = _open(job, path, display)
    directory = RunDirectory.create(path, job, simulation_context.base.digest, force)
    try:
        summary = _run(simulation_context, directory, display)
    finally:
        directory.close()
    export_and_answer(job, path, summary, display)
    return summary


def resume(path: Path, display: Display) -> dict[str, Any]:
    """Goes on with an interrupted run; the result is the same, bit for bit, as an undisturbed run's."""
    directory = RunDirectory.open(path)
    try:
        job = directory.job()
        if is_finished(path):
            display.note("all rounds are done already; only what follows from them is written again")
        summary = _run(_open(job, path, display), directory, display)
    finally:
        directory.close()
    export_and_answer(job, path, summary, display)
    return summary


def _open(job: Job, path: Path, display: Display) -> SimulationContext:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    check_export(job)
    simulation_context = SimulationContext.begin(job, path / CLIENTS)
    _ = (
        simulation_context.devices,
        simulation_context.evaluator,
    )  # mistakes in their files are told before anything is written
    clients = len(simulation_context.population.names)
    if job.secure_aggregation.enabled and (
        problems := secure_cohort_problems(job, cohort_size(job.federation.clients_per_round, clients))
    ):
        raise JobError(problems)
    wanted, selection = job.federation.clients_per_round, job.federation.selection
    if selection != "uniform" and simulation_context.devices is None:
        reason = "simulation.fleet names no fleet; there is one: --fleet bundled"
        raise JobError([f'federation.selection is "{selection}", but {reason}'])
    if isinstance(wanted, int) and wanted > clients:
        display.note(
            f"federation.clients_per_round is {wanted}, and there are {clients} clients: all are in every round"
        )
    model = simulation_context.model
    display.note(
        f"base {model.base.name} ({job.model.quantization}, {model.base.weights}, {model.base.precision}), "
        f"adapter of {model.layout.size:,} parameters, {clients} clients"
    )
    return simulation_context


def _run(simulation_context: SimulationContext, directory: RunDirectory, display: Display) -> dict[str, Any]:
    job = simulation_context.job
    clients = {FIRST_NODE_ID + index: name for index, name in enumerate(simulation_context.population.names)}
    nodes = {name: node_id for node_id, name in clients.items()}
    executor = _executor(simulation_context, clients)
    grid = InProcessGrid(executor, list(clients))
    devices = simulation_context.devices
    if devices is not None:
        for refusal in devices.refusals.values():
            display.note(f"sits out: {refusal}")
        grid = InProcessGrid(executor, list(clients), VirtualRounds(devices, clients, directory.path / VIRTUAL))
    secure = (
        SecureAggregation(SIMULATION, simulation_context.enrolment.roster) if job.secure_aggregation.enabled else None
    )
    base, layout = simulation_context.base, simulation_context.model.layout
    federation = assemble(job, base, layout, simulation_context.clients, secure=secure, trackers=[display])
    strategy = AdapterStrategy(federation, lambda _: nodes, grid.stale_updates)
    try:
        summary = run_rounds(strategy, directory, grid, simulation_context.evaluator, display, lambda: _facts(executor))
    finally:
        executor.close()
    if devices is not None:
        display.note(_course(read_virtual(directory.path / VIRTUAL)))
    return summary


def _course(virtual: list[dict[str, Any]]) -> str:
    """One line on how a fleet's rounds went on its clock, and whose updates counted."""
    counted = Counter(part["kind"] for line in virtual for part in line["clients"] if part["counts"])
    shares = ", ".join(f"{kind} {count / counted.total():.0%}" for kind, count in counted.most_common())
    seconds = sum(line["seconds"] for line in virtual)
    return f"virtual  {format_seconds(seconds)} in {len(virtual)} rounds of the fleet; updates: {shares or 'none'}"


def _facts(executor: WorkerPool) -> Facts:
    reports = executor.workers()
    cleaning = {client: part for report in reports for client, part in report.cleaning.items()}
    records = sum(cleaning.values(), CleaningReport())
    return Facts(peak_rss_mb() + sum(report.peak_rss_mb for report in reports), asdict(records))


def _executor(simulation_context: SimulationContext, clients: dict[int, str]) -> WorkerPool:
    workers = worker_count(simulation_context.job, simulation_context.model.base, len(clients))
    if simulation_context.job.simulation.backend == "ray":
        from fedtune.server.simulation.ray_executor import RayExecutor

        return RayExecutor(simulation_context, clients, workers)
    return (
        ForkedExecutor(simulation_context, clients, workers)
        if workers > 1
        else LocalExecutor(simulation_context, clients)
    )
