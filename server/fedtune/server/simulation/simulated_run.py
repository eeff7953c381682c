"""The rounds of a simulation: a strategy, and a grid in this process that its clients answer on."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.data.examples import CleaningReport
from fedtune.data.job_inputs import JobInputs
from fedtune.flower.in_process_grid import InProcessGrid
from fedtune.flower.strategy import AdapterStrategy
from fedtune.server.run_directory import CLIENTS, VIRTUAL, RunDirectory, read_virtual
from fedtune.server.run_display import Display, format_seconds
from fedtune.server.run_facts import peak_rss_mb
from fedtune.server.run_rounds import Facts, run_rounds
from fedtune.server.simulation.executors import ForkedExecutor, LocalExecutor, WorkerPool
from fedtune.server.simulation.simulated_fleet import VirtualRounds
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.server.simulation.workers import worker_count
from fedtune.strategies.assembly import assemble
from fedtune.strategies.secure_sum import SecureAggregation

FIRST_NODE_ID = 1000
SIMULATION = "simulation"  # names the run in the memory of simulated clients, which ends with it


def open_context(inputs: JobInputs, path: Path, display: Display) -> SimulationContext:
    """Loads what the processes of a simulation share.

    Args:
        inputs: checked.
        path: the run directory.

    Raises:
        InputError: the model or the fleet cannot be used.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    job = inputs.job
    context = SimulationContext.begin(job, path / CLIENTS, inputs)
    _ = context.devices, context.evaluator  # mistakes in their files are told before anything is written
    wanted, clients = job.federation.clients_per_round, len(inputs.population.names)
    if isinstance(wanted, int) and wanted > clients:
        display.note(
            f"federation.clients_per_round is {wanted}, and there are {clients} clients: all are in every round"
        )
    model = context.model
    display.note(
        f"base {model.base.name} ({job.model.quantization}, {model.base.weights}, {model.base.precision}), "
        f"adapter of {model.layout.size:,} parameters, {clients} clients"
    )
    return context


def run_job(simulation_context: SimulationContext, directory: RunDirectory, display: Display) -> dict[str, Any]:
    """Runs what is left of the job's rounds, and returns the summary."""
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
