"""The executors of a simulation on this machine: one thread of this process, or forks of it.

A fork shares the base model of this process: it is there in milliseconds and copies nothing, and what it writes is its
own. A client's answer depends on the job and the message alone, so a job's adapter is the same, bit for bit, whatever
the number of workers.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

import psutil  # type: ignore[import-untyped]

from fedtune.core.errors import RunError
from fedtune.core.host.process import peak_rss_mb
from fedtune.core.protocol.messages import Handler
from fedtune.data.examples import CleaningReport
from fedtune.flower.envelope import WireMessage, answer_wire
from fedtune.flower.in_process_grid import Executor, Outgoing
from fedtune.server.simulation.simulation_context import SimulationContext

_REPORT = None  # what a worker is sent to be asked for its report
_ENDING_SECONDS = 5.0  # that a worker has to end by itself
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
_MIB = 1 << 20


@dataclass(frozen=True)
class WorkerReport:
    """The end of a run as one process saw it.

    Args:
        peak_rss_mb: peak memory beside that of this process.
        cleaning: for each client that was run there, what became of its records.
    """

    peak_rss_mb: float
    cleaning: dict[str, CleaningReport]


class WorkerPool(Executor, Protocol):
    """An executor with processes of its own."""

    def workers(self) -> Sequence[WorkerReport]:
        """Asks each process that runs clients for its report, at the end of a run."""

    def close(self) -> None:
        """Frees whatever the executor holds."""


class LocalExecutor:
    """Runs every client on one thread, one message at a time, in the order of submission.

    Args:
        simulation_context: makes the handler of the clients' messages.
        clients: node id -> name of the client it stands for.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str]) -> None:
        self._simulation_context = simulation_context
        self._handler = simulation_context.handler()
        self._clients = clients
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulated-client")

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        """Queues the message for its client."""
        return self._thread.submit(self._run, message)

    def workers(self) -> Sequence[WorkerReport]:
        """Reports on one worker, which is this process."""
        return [WorkerReport(0.0, self._simulation_context.cleaning)]

    def close(self) -> None:
        """Drops what still waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, message: Outgoing) -> WireMessage:
        return answer_wire(message.pack(), self._clients[message.node], self._handler)


class ForkedExecutor:
    """Spreads clients over forks of this process.

    Args:
        simulation_context: its model is loaded before the forks, which share it.
        clients: node id -> name of the client it stands for.
        workers: how many forks.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str], workers: int) -> None:
        handler = simulation_context.handler()
        simulation_context.model  # noqa: B018  # loaded here, not in every fork
        context = get_context("fork")
        self._workers: list[tuple[BaseProcess, Connection]] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [ours, *(connection for _, connection in self._workers)]
            process = context.Process(
                target=_serve, args=(theirs, inherited, os.getpid(), handler, simulation_context, clients), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        # One thread a worker, which only waits for it; started after the last fork.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="forked-worker") for _ in self._workers]
        self._round = ""
        self._places: dict[int, int] = {}
        self._latest: dict[int, Future[WireMessage]] = {}

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        """Queues the message for its client's worker."""
        worker = self._find_place(message)
        self._latest[message.node] = self._threads[worker].submit(self._run, worker, message)
        return self._latest[message.node]

    def place(self, node_id: int) -> int:
        """Which worker has a client that has been given work this round."""
        return self._places[node_id]

    def workers(self) -> Sequence[WorkerReport]:
        """One report a worker."""
        reports = []
        for worker in range(len(self._workers)):
            report = self._threads[worker].submit(self._ask, worker, _REPORT).result()
            assert isinstance(report, WorkerReport)
            reports.append(report)
        return reports

    def close(self) -> None:
        """Ends the workers; one that is in the middle of a client's training is not waited for."""
        for process, _ in self._workers:
            process.terminate()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        for process, connection in self._workers:
            connection.close()
            process.join(_ENDING_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def _find_place(self, message: Outgoing) -> int:
        """The worker with the fewest clients this round; there a client stays for the round, with its secrets.

        One that is still busy with the round before stays where it is, so that nobody works in two places at once.
        """
        if message.group != self._round:
            self._round = message.group
            busy = {node_id for node_id, future in self._latest.items() if not future.done()}
            self._places = {node_id: place for node_id, place in self._places.items() if node_id in busy}
            self._latest = {node_id: future for node_id, future in self._latest.items() if node_id in busy}
        load = Counter(self._places.values())
        fewest = min(range(len(self._workers)), key=lambda worker: load[worker])
        return self._places.setdefault(message.node, fewest)

    def _run(self, worker: int, message: Outgoing) -> WireMessage:
        reply = self._ask(worker, (message.pack(), message.node))
        if isinstance(reply, Exception):
            raise reply
        assert isinstance(reply, WireMessage)
        return reply

    def _ask(self, worker: int, question: object) -> object:
        """Runs on the worker's own thread, so that questions and answers come in pairs."""
        process, connection = self._workers[worker]
        try:
            connection.send(question)
            return connection.recv()
        except (EOFError, OSError) as error:
            process.join(_ENDING_SECONDS)
            raise RunError(
                f"a worker of the simulation ended with exit status {process.exitcode}; was its memory short? "
                "Resume the run, with a lower simulation.workers in its job.toml"
            ) from error


def _serve(
    connection: Connection,
    inherited: Sequence[Connection],
    parent: int,
    handler: Handler,
    simulation_context: SimulationContext,
    clients: Mapping[int, str],
) -> None:
    """A fork's life: answers questions until nobody can ask any more."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not live through a fork
    for theirs in inherited:
        theirs.close()
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        if question is _REPORT:
            connection.send(WorkerReport(_own_peak_mb(), simulation_context.cleaning))
            continue
        wire, node_id = question
        connection.send(_outcome(handler, wire, clients[node_id]))


def _outcome(handler: Handler, wire: WireMessage, client: str) -> WireMessage | Exception:
    try:
        return answer_wire(wire, client, handler)
    except Exception as error:  # of whatever type a handler raises; it is raised again in the parent
        return _sendable(error)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign type's constructor thinks of its own arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _die_with(parent: int) -> None:
    """Ends this process when the parent does, even by kill -9: a run that is resumed must not meet its old workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be asked for
        os._exit(1)


def _own_peak_mb() -> float:
    """Peak memory of a fork without what it shares with others: what is its own now, and how far it has been above."""
    now = psutil.Process().memory_full_info()
    return float(now.uss) / _MIB + peak_rss_mb() - float(now.rss) / _MIB
