"""The `ray` backend: a pool of Ray actors, each with one base model that its simulated clients share.

It serves several processes, GPUs or machines. It uses Ray, an optional dependency of Flower, but not Flower's Ray
engine, which hands out one message a node per 0.1 s and loads the model again for every message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedtune.client.rendezvous import Answered
from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import MissingExtraError, RunError
from fedtune.core.host.process import peak_rss_mb
from fedtune.core.job.settings import Job
from fedtune.flower.envelope import WireMessage, answer_wire
from fedtune.flower.in_process_grid import Outgoing
from fedtune.model.scoring import Piece
from fedtune.server.simulation.executors import WorkerReport
from fedtune.server.simulation.placement import Placement
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.server.simulation.spreading import compute_piece, spread_over

RESTARTS_PER_WORKER = 3


class RayExecutor:
    """Spreads clients over actors.

    Args:
        simulation_context: the context of which every actor makes its own, of the same job and folder.
        clients: node id -> client name.
        workers: the number of actors.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str], workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError('simulation.backend = "ray"', "simulation", "ray") from error
        self._ray = ray
        self._clients = clients
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        gpus = float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
        actor: Any = ray.remote(_Worker).options(
            num_cpus=0,
            num_gpus=min(1.0, gpus / workers),
            max_restarts=RESTARTS_PER_WORKER,
            max_task_retries=RESTARTS_PER_WORKER,  # or an actor that starts again would fail all clients meanwhile
        )
        self._actors: list[Any] = [
            actor.remote(simulation_context.job, simulation_context.folder) for _ in range(workers)
        ]
        # One thread an actor, only waiting for answers.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="ray-worker") for _ in range(workers)]
        self._placement = Placement(self._threads, self._run)

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        """Queues the message for its client's actor."""
        return self._placement.submit(message)

    def spread(self, adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        """Spreads the pieces over the actors."""
        kept = self._ray.put(adapter)

        def ask(worker: int, _: Vector | None, piece: Piece[Any]) -> Any:
            return self._result(self._actors[worker].compute.remote(kept, piece))  # it may have started again meanwhile

        return spread_over(self._threads, ask, adapter, pieces)

    def workers(self) -> Sequence[WorkerReport]:
        """Returns one report an actor."""
        reports: list[WorkerReport] = self._ray.get([handle.report.remote() for handle in self._actors])
        return reports

    def close(self) -> None:
        """Ends the actors and Ray."""
        self._placement.close()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._ray.shutdown()

    def _run(self, worker: int, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> None:
        for index, message in enumerate(messages):
            handle = self._actors[worker].answer.remote(message.pack(), self._clients[message.node])
            answered(index, self._result(handle))

    def _result(self, handle: Any) -> Any:
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayActorError as error:
            raise RunError(
                f"a worker of the simulation ended {RESTARTS_PER_WORKER + 1} times (out of memory?). Resume the run, "
                "with a lower simulation.workers in its job.toml"
            ) from error


class _Worker:
    """The part of the executor that runs inside an actor."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._simulation_context = SimulationContext.begin(job, folder)
        self._handler = self._simulation_context.handler()

    def answer(self, wire: WireMessage, client: str) -> WireMessage:
        """Returns the named client's answer to one message."""
        return answer_wire(wire, client, self._handler)

    def compute(self, adapter: Vector, piece: Piece[Any]) -> Any:
        """Returns the result of a piece of an evaluation."""
        return compute_piece(self._simulation_context.model, adapter, piece)

    def report(self) -> WorkerReport:
        """Returns this actor's report."""
        return WorkerReport(peak_rss_mb(), self._simulation_context.cleaning)
