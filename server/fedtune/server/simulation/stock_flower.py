"""A ServerApp and a ClientApp for stock Flower: `flwr run`, its simulation engine, or any SuperLink.

    from fedtune.server.simulation.stock_flower import flower_client_app, flower_server_app
    app = flower_server_app()                                # server_app.py
    app = flower_client_app()                                # client_app.py

The run configuration says what to run: `job` (a job file, "" for the demo), `set` (overrides as on the command line,
separated by spaces) and `out` (the run directory). See examples/flower-app. Flower's engine makes new clients
for every message, so they cannot go through a secure round's five: the job must say secure_aggregation.enabled = false.
"""

from __future__ import annotations

import functools
from pathlib import Path

from fedtune.core.adapter.layout import AdapterLayout
from fedtune.core.errors import JobError
from fedtune.core.host.process import peak_rss_mb
from fedtune.core.job.job_file import load_job
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Base, Handler, Request
from fedtune.flower.stock_apps import ClientApp, Grid, RunConfig, ServerApp, client_app, server_app
from fedtune.flower.strategy import AdapterStrategy, roster_by_node_id
from fedtune.server.evaluation import HeldOutEvaluator, in_this_process
from fedtune.server.run_directory import CLIENTS, RunDirectory
from fedtune.server.run_display import Terminal
from fedtune.server.run_rounds import Facts, run_rounds
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.assembly import NO_PARTS, Clients, Parts, assemble


def flower_server_app() -> ServerApp:
    """Returns a ServerApp that runs the job of its run configuration."""

    def main(grid: Grid, config: RunConfig) -> None:
        path = Path(str(config["out"]))
        simulation_context = SimulationContext.begin(_job(config), path / CLIENTS)
        job = with_learning_rate(simulation_context.job, simulation_context.model.layout)
        directory = RunDirectory.create(path, job, simulation_context.base.digest)
        try:
            with Terminal() as display:
                base, layout = simulation_context.base, simulation_context.model.layout
                strategy = stock_strategy(job, base, layout, grid, Parts(trackers=[display]))
                here = in_this_process(simulation_context.model)
                evaluator = HeldOutEvaluator(simulation_context.held_out, here)
                run_rounds(strategy, directory, grid, evaluator, display, lambda: Facts(peak_rss_mb(), {}))
        finally:
            directory.close()

    return server_app(main)


def flower_client_app() -> ClientApp:
    """Returns a ClientApp that acts as the client of its node's partition."""
    return client_app(_answer)


def _answer(config: RunConfig, partition: int, request: Request) -> bytes:
    job = _job(config)
    folder = Path(str(config["out"])) / CLIENTS
    names = _simulation_context(job, folder).population.names
    return _handler(job, folder)(names[partition % len(names)], request)


def _job(config: RunConfig) -> Job:
    path = str(config.get("job", ""))
    job = load_job(Path(path) if path else None, str(config.get("set", "")).split())
    problems = []
    if job.secure_aggregation.enabled:
        problem = "secure_aggregation.enabled is true, but Flower's engine makes new clients for every message"
        problems.append(f"{problem}; put secure_aggregation.enabled=false into the run configuration's set")
    if job.simulation.together != 1:
        problem = (
            f"simulation.together is {job.simulation.together}, but Flower's engine gives out one message at a time"
        )
        problems.append(f"{problem}; expected 1")
    if job.simulation.fleet:
        problem = "simulation.fleet is set, but Flower's engine has no virtual clock"
        problems.append(f"{problem}; run it with fedtune simulate, or say simulation.ranks instead")
    if problems:
        raise JobError(problems)
    return job


def stock_strategy(job: Job, base: Base, layout: AdapterLayout, grid: Grid, parts: Parts = NO_PARTS) -> AdapterStrategy:
    """Returns the strategy of a job whose clients are the grid's nodes, named by their ids.

    Ranks that the job assigns are dealt out in the order of the names.

    Raises:
        JobError: as `assemble`.
    """
    dealt = job.simulation.ranks
    clients = Clients()
    if dealt:
        clients = Clients(ranks=lambda name: dealt[sorted(roster_by_node_id(grid)).index(name) % len(dealt)])
    return AdapterStrategy(assemble(job, base, layout, clients, parts=parts))


# A process that Flower keeps for several messages loads the base only once.
@functools.lru_cache(maxsize=1)
def _simulation_context(job: Job, folder: Path) -> SimulationContext:
    return SimulationContext.begin(job, folder)


@functools.lru_cache(maxsize=1)
def _handler(job: Job, folder: Path) -> Handler:
    return _simulation_context(job, folder).handler()
