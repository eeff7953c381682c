"""The default backend with one worker: simulated clients take turns on one thread of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.flower.in_process_grid import RUN_ID, WorkerReport
from fedtune.flower.message_bytes import WireMessage, from_wire, to_wire
from fedtune.server.simulation.simulation_context import SimulationContext


class LocalExecutor:
    """Runs one ClientApp for every node, one message at a time, in the order of submission.

    Args:
        simulation context: makes the ClientApp.
        clients: node id -> name of the client it stands for.
    """

    def __init__(self, simulation_context: SimulationContext, clients: Mapping[int, str]) -> None:
        self._simulation_context = simulation_context
        self._app = simulation_context.client_app()
        self._clients = clients
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulated-client")

    def submit(self, message: Message) -> Future[WireMessage]:
        """Queues the message for its client."""
        return self._thread.submit(self._run, message)

    def workers(self) -> Sequence[WorkerReport]:
        """One worker, which is this process."""
        return [WorkerReport(0.0, self._simulation_context.cleaning)]

    def close(self) -> None:
        """Drops what still waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, message: Message) -> WireMessage:
        node_id = message.metadata.dst_node_id
        return answer(self._app, to_wire(message), node_id, self._clients[node_id])


def answer(app: ClientApp, wire: WireMessage, node_id: int, client: str) -> WireMessage:
    """Lets a ClientApp answer one message as the named client, bytes in and bytes out."""
    context = Context(RUN_ID, node_id, {"client": client}, RecordDict(), {})
    reply = app(from_wire(wire), context)
    return to_wire(reply)
