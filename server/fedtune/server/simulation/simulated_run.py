"""The rounds of a simulation: a strategy, and a grid in this process through which its clients answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedtune.client.plan.machine import Machine, probe
from fedtune.client.plan.planner import RESERVE
from fedtune.client.plan.step_costs import Choices, predict_memory
from fedtune.core.codec.noise_seeds import from_seed
from fedtune.core.errors import JobError
from fedtune.core.host.process import peak_rss_mb
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.job.unusual import Surroundings, unusual
from fedtune.core.text import counted
from fedtune.data.evaluation_match import mismatches
from fedtune.data.examples import CleaningReport
from fedtune.data.job_inputs import JobInputs
from fedtune.flower.in_process_grid import InProcessGrid
from fedtune.flower.strategy import AdapterStrategy
from fedtune.model.base_model import BaseModel, best_precision
from fedtune.model.scoring import evaluation_tokens
from fedtune.model.shape import Precision, Weights, adapted_modules, shape_of
from fedtune.server.custom_metrics import NO_METRICS, CustomMetrics
from fedtune.server.evaluation import HeldOutEvaluator
from fedtune.server.run_directory import CLIENTS, VIRTUAL, RunDirectory, read_virtual
from fedtune.server.run_display import Display, format_seconds
from fedtune.server.run_rounds import Facts, run_rounds
from fedtune.server.simulation.executors import ForkedExecutor, LocalExecutor, WorkerPool
from fedtune.server.simulation.simulated_fleet import PROGRAM_BYTES, VirtualRounds
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.assembly import NO_PARTS, Parts, assemble
from fedtune.strategies.cohorts.selection import cohort_size
from fedtune.strategies.secure_sum import SecureAggregation

FIRST_NODE_ID = 1000


def open_context(
    inputs: JobInputs, path: Path, display: Display, metrics: CustomMetrics = NO_METRICS
) -> SimulationContext:
    """Loads the model and data that the processes of a simulation share.

    Args:
        inputs: the job's checked inputs.
        path: the run directory.
        metrics: the user's own metrics.

    Raises:
        InputError: the model, the fleet, the held-out examples or a metric cannot be used.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    job = inputs.job
    together = clients_together(job, len(inputs.population.names))
    context = SimulationContext.begin(job, path / CLIENTS, inputs, together=together, metrics=metrics)
    adapted_modules(context.shape.linear, job.adapter)  # refuses a wrong adapter before the weights are loaded
    _ = context.devices, context.held_out  # reports mistakes in their files before anything is written
    for warning in _warnings(context):
        display.note(warning)
    model = context.model
    rate = with_learning_rate(job, model.layout).training.first_learning_rate
    display.note(
        f"base {model.base.name} ({job.model.quantization}, {model.base.weights}, {model.base.precision}), "
        f"adapter of {model.layout.size:,} parameters, learning rate {rate:g}, "
        f"{counted(len(inputs.population.names), 'client')}" + (f", {together} in a pass" if together > 1 else "")
    )
    return context


def _warnings(context: SimulationContext) -> list[str]:
    """Returns a line for each unusual value of the job, and for each way in which the evaluation is on other data."""
    shape, held_out = context.shape, context.held_out
    clients = len(context.population.names)
    known = Surroundings(shape.width, shape.positions, len(held_out.examples), held_out.example_tokens, clients)
    return unusual(context.job, known) + mismatches(context.population.sample(), context.inputs.evaluation)


def run_job(
    simulation_context: SimulationContext, directory: RunDirectory, display: Display, parts: Parts = NO_PARTS
) -> dict[str, Any]:
    """Runs the remaining rounds of the job, and returns the summary.

    Args:
        parts: replacements of the parts that the job names.
    """
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
    secure = SecureAggregation(simulation_context.enrolment.roster) if job.secure_aggregation.enabled else None
    base, layout = simulation_context.base, simulation_context.model.layout
    parts = replace(parts, trackers=[display, *parts.trackers])
    noise = from_seed(simulation_context.terms.seed)
    federation = assemble(job, base, layout, simulation_context.clients, secure=secure, parts=parts, noise=noise)
    strategy = AdapterStrategy(federation, lambda _: nodes, grid.stale_updates, grid.bound_replies)
    evaluator = HeldOutEvaluator(simulation_context.held_out, executor.spread)
    try:
        summary = run_rounds(
            strategy,
            directory,
            grid,
            evaluator,
            display,
            lambda: _facts(executor, simulation_context, directory, display),
        )
    finally:
        executor.close()
    if devices is not None:
        display.note(_course(read_virtual(directory.path / VIRTUAL)))
    return summary


def _course(virtual: list[dict[str, Any]]) -> str:
    """Returns a line about a fleet's rounds on its virtual clock, and each kind's share of the updates."""
    updates = Counter(part["kind"] for line in virtual for part in line["clients"] if part["counts"])
    shares = ", ".join(f"{kind} {count / updates.total():.0%}" for kind, count in updates.most_common())
    seconds = sum(line["seconds"] for line in virtual)
    rounds = counted(len(virtual), "round")
    return f"virtual  {format_seconds(seconds)} in {rounds} of the fleet; updates: {shares or 'none'}"


def _facts(
    executor: WorkerPool, simulation_context: SimulationContext, directory: RunDirectory, display: Display
) -> Facts:
    reports = executor.workers()
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        display.note(note)
    cleaning = {client: part for report in reports for client, part in report.cleaning.items()}
    for client in sorted(_readers(directory.rounds()) - cleaning.keys()):  # they read before the run was resumed
        simulation_context.examples(client, simulation_context.trainer, simulation_context.job.data.sequence_length)
        cleaning[client] = simulation_context.cleaning[client]
    shared = simulation_context.population.shared_bad_lines
    records = sum(cleaning.values(), CleaningReport(read=shared, bad=shared))
    return Facts(peak_rss_mb() + sum(report.peak_rss_mb for report in reports), asdict(records), seeded_noise=True)


def _readers(rounds: list[dict[str, Any]]) -> set[str]:
    """Returns the clients that have trained or evaluated, and so have read their examples."""
    trained = {part["id"] for line in rounds for part in line["clients"] if part["dropped"] is None}
    return trained | {part["id"] for line in rounds for part in line["client_evaluations"] if part["eval"]}


def _executor(simulation_context: SimulationContext, clients: dict[int, str]) -> WorkerPool:
    job, base, together = simulation_context.job, simulation_context.model.base, simulation_context.together
    workers = worker_count(job, base, len(clients), together)
    if simulation_context.job.simulation.backend == "ray":
        from fedtune.server.simulation.ray_executor import RayExecutor

        return RayExecutor(simulation_context, clients, workers)
    return (
        ForkedExecutor(simulation_context, clients, workers)
        if workers > 1
        else LocalExecutor(simulation_context, clients)
    )


def worker_count(
    job: Job, base: BaseModel, population: int, together: int = 1, probe: Callable[[], Machine] = probe
) -> int:
    """Returns the number of workers: the job's, or one a core or GPU, at most the cohort's passes, within free memory.

    Args:
        together: clients in a pass.
        probe: measures the machine.

    Raises:
        JobError: the job asks for forks that would share a GPU.
    """
    settings, on_gpu = job.simulation, base.device.type == "cuda"
    if settings.workers != "auto":
        if settings.backend == "local" and settings.workers > 1 and on_gpu:
            problem = f"simulation.workers is {settings.workers}, but forks cannot share a base model on a GPU; "
            raise JobError([problem + 'expected simulation.workers = 1 or simulation.backend = "ray"'])
        return settings.workers
    if settings.backend == "local" and (on_gpu or settings.threads != 1):
        return 1
    machine = probe()
    fit = _that_fit(job, base, machine.memory_free, together)
    places = torch.cuda.device_count() if on_gpu else min(int(machine.cores), fit)
    return max(1, min(places, -(-cohort_size(job.federation.clients_per_round, population) // together)))


def clients_together(job: Job, population: int, probe: Callable[[], Machine] = probe) -> int:
    """Returns the number of clients that a worker trains in one pass: the job's, or for "auto" as many as fit.

    A pass has at most the tokens that are computed fastest at once, and of several workers each has two passes, so that
    the server takes in the answers of one during the next. Of the free memory, the planner's formula gives the base
    model its part and the clients the rest.

    Args:
        probe: measures the machine.
    """
    settings = job.simulation
    if settings.together != "auto":
        return settings.together
    if settings.backend == "ray":
        return 1
    machine = probe()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    cohort = cohort_size(job.federation.clients_per_round, population)
    workers: int = 1 if on_gpu or settings.threads != 1 else max(1, min(int(machine.cores), cohort))
    if settings.workers != "auto":
        workers = settings.workers
    precision = best_precision(device) if job.training.precision == "auto" else job.training.precision
    packed = job.training.weights == "packed"
    predicted = predict_memory(
        shape_of(job.model), _choices(job, "packed" if packed else "dequantized", precision, on_gpu)
    )
    free = torch.cuda.mem_get_info()[0] if on_gpu else machine.memory_free
    client = predicted.training - predicted.weights
    fit = int((free * (1 - RESERVE) - predicted.weights) / (workers * client))
    passes = workers if workers == 1 else 2 * workers
    return max(1, min(fit, evaluation_tokens(device) // job.training.batch_tokens, -(-cohort // passes)))


def _that_fit(job: Job, base: BaseModel, free: int, together: int) -> int:
    """Returns how many workers fit into the free memory by the planner's formula."""
    predicted = predict_memory(shape_of(job.model), _choices(job, base.weights, base.precision))
    actor, fork = PROGRAM_BYTES + predicted.peak, together * (predicted.training - predicted.weights)
    return int(free * (1 - RESERVE) / (actor if job.simulation.backend == "ray" else fork))


def _choices(job: Job, weights: Weights, precision: Precision, cuda: bool = False) -> Choices:
    """Returns the choices by which the planner predicts the memory of one client's steps."""
    return Choices(
        weights=weights,
        precision=precision,
        rank=job.adapter.rank,
        sequence_length=job.data.sequence_length,
        tokens=job.training.batch_tokens,
        checkpointing=job.training.gradient_checkpointing,
        cuda=cuda,
        kind=job.adapter.kind,
        quantization=job.model.quantization,
    )
