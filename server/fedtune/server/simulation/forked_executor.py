"""The default backend where it has several workers: forks of this process, which share its base model.

A fork is there in milliseconds and copies nothing: the base lies in memory once, and what a worker writes is its own.
What a client answers depends on the job and the message alone, so a job's adapter is the same, bit for bit, whatever
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
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil  # type: ignore[import-untyped]
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedtune.core.errors import RunError
from fedtune.flower.in_process_grid import WorkerReport
from fedtune.flower.message_bytes import WireMessage, to_wire
from fedtune.server.run_facts import peak_rss_mb
from fedtune.server.simulation.local_executor import answer
from fedtune.server.simulation.simulation_context import SimulationContext

_REPORT = None  # what a worker is sent to be asked for its report
_ENDING_SECONDS = 5.0  # that a worker has to end by itself
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
_MIB = 1 << 20


class ForkedExecutor:
    """Spreads clients over forks of this process.

    Args:
        simulation context: its model is loaded before the forks, which share it.
        clients: node id -> name of the client it stands for.
        workers: how many forks.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str], workers: int) -> None:
        app = simulation_context.client_app()
        simulation_context.model  # noqa: B018  # loaded here, not in every fork
        context = get_context("fork")
        self._workers: list[tuple[BaseProcess, Connection]] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [ours, *(connection for _, connection in self._workers)]
            process = context.Process(
                target=_serve, args=(theirs, inherited, os.getpid(), app, simulation_context, clients), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        # One thread a worker, which only waits for it; started after the last fork.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="forked-worker") for _ in self._workers]
        self._round = ""
        self._places: dict[int, int] = {}
        self._latest: dict[int, Future[WireMessage]] = {}

    def submit(self, message: Message) -> Future[WireMessage]:
        """Queues the message for its client's worker."""
        worker, node_id = self._find_place(message), message.metadata.dst_node_id
        self._latest[node_id] = self._threads[worker].submit(self._run, worker, message)
        return self._latest[node_id]

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

    def _find_place(self, message: Message) -> int:
        """The worker with the fewest clients this round; there a client stays for the round, with its secrets.

        One that is still busy with the round before stays where it is, so that nobody works in two places at once.
        """
        if message.metadata.group_id != self._round:
            self._round = message.metadata.group_id
            busy = {node_id for node_id, future in self._latest.items() if not future.done()}
            self._places = {node_id: place for node_id, place in self._places.items() if node_id in busy}
            self._latest = {node_id: future for node_id, future in self._latest.items() if node_id in busy}
        load = Counter(self._places.values())
        fewest = min(range(len(self._workers)), key=lambda worker: load[worker])
        return self._places.setdefault(message.metadata.dst_node_id, fewest)

    def _run(self, worker: int, message: Message) -> WireMessage:
        reply = self._ask(worker, (to_wire(message), message.metadata.dst_node_id))
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
    app: ClientApp,
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
        connection.send(_outcome(app, wire, node_id, clients[node_id]))


def _outcome(app: ClientApp, wire: WireMessage, node_id: int, client: str) -> WireMessage | Exception:
    try:
        return answer(app, wire, node_id, client)
    except Exception as error:  # of whatever type a ClientApp raises; it is raised again in the parent
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
