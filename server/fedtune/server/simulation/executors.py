"""The executors of a simulation on this machine: one thread of this process, or forked processes.

A fork starts in milliseconds and shares the base model of this process, copy-on-write. A client's answer depends only
on the job and the message, so a job's adapter is the same, bit for bit, for any number of workers.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]

from fedtune.client.rendezvous import Answered
from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import RunError
from fedtune.core.host.process import peak_rss_mb
from fedtune.core.protocol.messages import Handler
from fedtune.core.spans import WORKER, Place, Span, absorb, add_span, drain, now, record_in_fork
from fedtune.data.examples import CleaningReport
from fedtune.flower.envelope import WireMessage
from fedtune.flower.in_process_grid import Executor, Outgoing
from fedtune.model.scoring import Piece
from fedtune.server.simulation.passes import Passes, answer_together
from fedtune.server.simulation.placement import Placement
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.server.simulation.spreading import compute_piece, spread_over

_ENDING_SECONDS = 5.0  # how long a worker may take to end by itself
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
_MIB = 1 << 20


@dataclass(frozen=True)
class WorkerReport:
    """One process's report at the end of a run.

    Args:
        peak_rss_mb: peak memory in MB, without that of the parent process.
        cleaning: client that ran there -> the counts of its records after cleaning.
        notes: what people should know about the training there.
    """

    peak_rss_mb: float
    cleaning: dict[str, CleaningReport]
    notes: tuple[str, ...] = ()


class WorkerPool(Executor, Protocol):
    """An executor whose workers evaluate, too."""

    def spread(self, adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        """Has pieces of an evaluation computed by all workers, as `fedtune.server.evaluation.Spread` describes."""

    def workers(self) -> Sequence[WorkerReport]:
        """Collects the report of each process that runs clients, at the end of a run."""

    def close(self) -> None:
        """Frees the executor's resources."""


class LocalExecutor:
    """Runs every client on one thread, one pass at a time, in the order of submission.

    Args:
        simulation_context: makes the handler of the clients' messages.
        clients: node id -> client name.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str]) -> None:
        self._simulation_context = simulation_context
        self._handler = simulation_context.handler()
        self._clients = clients
        self._passes = Passes(simulation_context.together)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulated-client")
        self._began = now()

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        """Queues the message for its client."""
        return self._passes.submit(message, lambda _: 0, lambda *asked: self._thread.submit(self._run, *asked))

    def spread(self, adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        """Computes the pieces on the clients' thread, so that nothing else uses the model meanwhile."""
        return spread_over([self._thread], self._compute, adapter, pieces)

    def workers(self) -> Sequence[WorkerReport]:
        """Returns the report of one worker, which is this process."""
        return [WorkerReport(0.0, self._simulation_context.cleaning, tuple(self._simulation_context.notes))]

    def close(self) -> None:
        """Drops the messages that still wait."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        add_span(WORKER, "worker 1", Place(os.getpid(), "simulated-client_0"), self._began, own=False)

    def _run(self, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> None:
        asked = [(message.pack(), self._clients[message.node]) for message in messages]
        answer_together(asked, self._handler, self._simulation_context, answered)

    def _compute(self, _: int, adapter: Vector | None, piece: Piece[Any]) -> Any:
        return compute_piece(self._simulation_context.model, adapter, piece)


class ForkedExecutor:
    """Spreads clients over forks of this process.

    Args:
        simulation_context: the context whose model is loaded before the forks, which share it.
        clients: node id -> client name.
        workers: the number of forks.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str], workers: int) -> None:
        handler = simulation_context.handler()
        simulation_context.model  # noqa: B018  # loads it here, not in every fork
        context = get_context("fork")
        self._began = now()
        self._workers: list[tuple[BaseProcess, Connection]] = []
        gc.freeze()  # the collector of a fork would write to every object here, and so copy all their pages
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                inherited = [ours, *(connection for _, connection in self._workers)]
                asked = (theirs, inherited, os.getpid(), handler, simulation_context, clients)
                process = context.Process(target=_serve, args=asked, daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
        finally:
            gc.unfreeze()
        # One thread a worker, which only waits for its answers; the threads start after the last fork.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="forked-worker") for _ in self._workers]
        self._placement = Placement(self._threads, self._run, simulation_context.together)

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        """Queues the message for its client's worker."""
        return self._placement.submit(message)

    def spread(self, adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        """Spreads the pieces over the forks."""
        return spread_over(self._threads, self._compute, adapter, pieces)

    def workers(self) -> Sequence[WorkerReport]:
        """Returns one report a worker."""
        reports = []
        for worker in range(len(self._workers)):
            report = self._threads[worker].submit(self._ask, worker, _Report()).result()
            assert isinstance(report, WorkerReport)
            reports.append(report)
        return reports

    def close(self) -> None:
        """Ends the workers, without waiting for clients that are still training."""
        for process, _ in self._workers:
            process.terminate()
        self._placement.close()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        for process, connection in self._workers:
            connection.close()
            process.join(_ENDING_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for number, (process, _) in enumerate(self._workers, 1):
            add_span(WORKER, f"worker {number}", _place(process), self._began, own=False)

    def _run(self, worker: int, messages: Sequence[Outgoing], answered: Answered[WireMessage]) -> None:
        self._ask(worker, _Messages([(message.pack(), message.node) for message in messages]), answered)

    def _compute(self, worker: int, adapter: Vector | None, piece: Piece[Any]) -> Any:
        return self._ask(worker, _Compute(adapter, piece))

    def _ask(self, worker: int, question: _Question, answered: Answered[Any] | None = None) -> object:
        """Sends a question and returns its answer, on the worker's own thread, so that both come in pairs.

        Args:
            answered: told of what the worker sends ahead of its answer.

        Raises:
            RunError: the worker has ended.
            Exception: the error with which the worker answered.
        """
        process, connection = self._workers[worker]
        asked = now()
        try:
            connection.send(question)
            while isinstance(received := connection.recv(), _Ahead):
                assert answered is not None
                answered(received.index, received.answer)
        except (EOFError, OSError) as error:
            process.join(_ENDING_SECONDS)
            add_span("cut off", "", _place(process), asked)
            raise RunError(
                f"a worker of the simulation ended with exit status {process.exitcode} (out of memory?). "
                "Resume the run, with a lower simulation.workers in its job.toml"
            ) from error
        spans, reply = received
        absorb(spans)
        if isinstance(reply, Exception):
            raise reply
        return reply


def _place(process: BaseProcess) -> Place:
    assert process.pid is not None  # it was started
    return Place(process.pid, "MainThread")


@dataclass(frozen=True)
class _Ahead:
    """The answer to one of a question's messages, which a fork sends before its answer to the question."""

    index: int
    answer: WireMessage | Exception


@dataclass(frozen=True)
class _Fork:
    """The inside of a fork, by which it answers questions.

    Args:
        send_ahead: sends the answer to one of a question's messages.
    """

    handler: Handler
    simulation_context: SimulationContext
    clients: Mapping[int, str]
    send_ahead: Answered[WireMessage]


class _Question(Protocol):
    """A question to a fork."""

    def answer(self, fork: _Fork) -> object:
        """Returns the answer, in the fork."""


@dataclass(frozen=True)
class _Report:
    """Asks for the fork's report."""

    def answer(self, fork: _Fork) -> object:
        context = fork.simulation_context
        return WorkerReport(_own_peak_mb(), context.cleaning, tuple(context.notes))


@dataclass(frozen=True)
class _Messages:
    """The messages of one pass, each with the node of the fork's client that it is for."""

    wires: Sequence[tuple[WireMessage, int]]

    def answer(self, fork: _Fork) -> object:
        asked = [(wire, fork.clients[node]) for wire, node in self.wires]
        answer_together(asked, fork.handler, fork.simulation_context, fork.send_ahead)
        return None


@dataclass(frozen=True, eq=False)
class _Compute:
    """A piece of an evaluation; without an adapter, of the one that came last."""

    adapter: Vector | None
    piece: Piece[Any]

    def answer(self, fork: _Fork) -> object:
        return compute_piece(fork.simulation_context.model, self.adapter, self.piece)


def _serve(
    connection: Connection,
    inherited: Sequence[Connection],
    parent: int,
    handler: Handler,
    simulation_context: SimulationContext,
    clients: Mapping[int, str],
) -> None:
    """Runs in a fork: answers questions until the parent has closed the connection."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for theirs in inherited:
        theirs.close()
    record_in_fork()

    def send_ahead(index: int, answer: WireMessage | Exception) -> None:
        connection.send(_Ahead(index, _sendable(answer) if isinstance(answer, Exception) else answer))

    fork = _Fork(handler, simulation_context, clients, send_ahead)
    while True:
        try:
            question: _Question = connection.recv()
        except EOFError:
            return
        outcome = _outcome(question, fork)
        answer: tuple[Sequence[Span], object] = (drain(), outcome)
        connection.send(answer)


def _outcome(question: _Question, fork: _Fork) -> object:
    try:
        return question.answer(fork)
    except Exception as error:  # a handler may raise any type; the parent raises it again
        return _sendable(error)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a type whose constructor refuses its own arguments can raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _die_with(parent: int) -> None:
    """Makes this process end with its parent, even by kill -9; a resumed run must not meet its old workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def _own_peak_mb() -> float:
    """Returns a fork's peak memory without shared pages: its private memory now, plus the peak's excess over now."""
    now = psutil.Process().memory_full_info()
    return float(now.uss) / _MIB + peak_rss_mb() - float(now.rss) / _MIB
