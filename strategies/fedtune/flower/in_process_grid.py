"""Flower's Grid over executors in place of a SuperLink: push hands messages to executors, pull takes what is done.

Measured on flwr 1.41: 100 lockstep messages take 0.16 s here, serialisation included, and 10 s on Flower's Ray engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.core.errors import RunError
from fedtune.data.examples import CleaningReport
from fedtune.flower.message_bytes import WireMessage, from_wire, set_message_id

RUN_ID = 1


@dataclass(frozen=True)
class WorkerReport:
    """What one process saw of a simulation.

    Args:
        peak_rss_mb: peak memory beside that of this process.
        cleaning: what became of the records of each client whose turn came there.
    """

    peak_rss_mb: float
    cleaning: dict[str, CleaningReport]


class Executor(Protocol):
    """Runs the ClientApp for one message."""

    def submit(self, message: Message) -> Future[WireMessage]:
        """Queues the work; the future holds the reply, the exception that the ClientApp raised, or a RunError.

        The message is serialised when its turn comes, so that a waiting cohort shares one copy of the adapter.
        """

    def workers(self) -> Sequence[WorkerReport]:
        """What each process that runs clients has to say, at the end of a run."""

    def close(self) -> None:
        """Frees whatever the executor holds."""


class InProcessGrid(Grid):
    """The Grid of a simulation.

    Args:
        executor: who runs the clients.
        node_ids: the nodes there are.
    """

    def __init__(self, executor: Executor, node_ids: Sequence[int]) -> None:
        take_task_identity()
        self._executor = executor
        self._node_ids = list(node_ids)
        self._run = Run.create_empty(run_id=RUN_ID)
        self._numbers = itertools.count(1)
        self._pending: dict[str, tuple[Message, Future[WireMessage]]] = {}

    def set_run(self, run: Run) -> None:
        """Sets what `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid serves."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; in a simulation each can always be reached."""
        return list(self._node_ids)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hands the messages to the executor."""
        message_ids = []
        for message in messages:
            message_id = f"message-{next(self._numbers)}"
            set_message_id(message, message_id)
            self._pending[message_id] = (message, self._executor.submit(message))
            message_ids.append(message_id)
        return message_ids

    def fail(self, message: Message, error: Exception) -> str:
        """Takes a message as pushed whose client is known to fail; the id of its reply."""
        message_id = f"message-{next(self._numbers)}"
        set_message_id(message, message_id)
        failed: Future[WireMessage] = Future()
        failed.set_exception(error)
        self._pending[message_id] = (message, failed)
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now, each once.

        Raises:
            RunError: the executor cannot go on.
        """
        for message_id in message_ids:
            if message_id in self._pending and self._pending[message_id][1].done():
                message, future = self._pending.pop(message_id)
                yield _reply(message, future)

    def stale_updates(self) -> Iterable[Message]:
        """The answers that came when their round had closed; here none does."""
        return ()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pushes, waits for all replies or the timeout, and pulls."""
        message_ids = list(self.push_messages(messages))
        wait([self._pending[message_id][1] for message_id in message_ids], timeout)
        return list(self.pull_messages(message_ids))


def take_task_identity() -> None:
    """Tells Flower who this process is, which a Message outside Flower's own processes needs."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID


def _reply(message: Message, future: Future[WireMessage]) -> Message:
    error = future.exception()
    if error is None:
        return from_wire(future.result())
    if isinstance(error, RunError):  # the executor's, not the client's
        raise error
    code = ErrorCode.NODE_UNAVAILABLE if isinstance(error, ConnectionError) else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, f"{type(error).__name__}: {error}"), reply_to=message)
