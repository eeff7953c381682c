"""The SuperLink, and calls to it (flwr 1.41); `tests/live/test_flower_contract.py` checks the internals it uses.

app = link_app(database, secret)                    the SuperLink's API, in the process that listens
link = Link(address, authority, control_key)        the server's own calls to it
grid = link.open_run()                              a Flower grid for one run
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

from fedtune.core.errors import RunError
from fedtune.core.protocol.bundles import MAX_BATCH_BYTES
from fedtune.flower.guard import CONTROL_HEADER, App
from fedtune.flower.run_grid import LinkLostError, RunGrid, called

_READY_SECONDS = 60.0
_POLL_SECONDS = 0.05
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"

# A Flower app without code, since a run needs one. Devices never request it, and the server runs installed code.
_APP = b"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fedtune"
version = "1.0.0"
description = ""
dependencies = []
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "fedtune.none:app"
clientapp = "fedtune.none:app"
[tool.flwr.app.config]
"""

T = TypeVar("T")


def link_app(database: Path, secret: str) -> App:
    """Returns the SuperLink's ASGI application with the calls of devices, and its state in one SQLite file."""
    os.environ["FLWR_DATABASE"] = str(database)
    from flwr.superlink.main import create_app

    from fedtune.flower.link_endpoints import LinkEndpoints

    app = create_app()
    app.state.enable_supernode_auth = True
    app.state.superexec_auth_secret = secret.encode()
    return LinkEndpoints(app, database.parent)


@dataclass(frozen=True)
class NodeState:
    """The SuperLink's view of a registered device."""

    node_id: int
    public_key: bytes
    online: bool
    online_until: float
    ever_online: bool


class Link:
    """The server's own calls to its SuperLink.

    Args:
        address: HOST:PORT of the private socket.
        authority: authority of the server's certificate, PEM.
        control_key: key that the guard requires.
        report: receives messages about unexpected events.
        alive: whether the listening process still runs; see `called`.
    """

    def __init__(
        self,
        address: str,
        authority: bytes,
        control_key: str,
        report: Callable[[str], None],
        alive: Callable[[], bool],
    ) -> None:
        self._address, self._authority, self._key, self._report = address, authority, control_key, report
        self._alive = alive
        version = RuntimeVersionHttpInterceptor("fedtune-server")
        control = _ControlInterceptor(control_key)
        secret = SuperExecAuthHttpInterceptor(master_secret=control_key.encode(), protected_methods={_ACQUIRE})
        self._control = ControlHttpClient.from_server_address(address, False, authority, [version, control])
        self._runtime = RuntimeHttpClient.from_server_address(address, False, authority, [version, control, secret])
        self._acquiring = threading.Lock()
        self._fab = build_fab_from_files({"pyproject.toml": _APP})[0]

    def close(self) -> None:
        """Closes the connections."""
        self._control.close()
        self._runtime.close()

    def wait_until_ready(self) -> None:
        """Waits until the listening process is ready.

        Raises:
            RunError: it ended, or did not answer in time.
        """
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self._alive():
            try:
                self.nodes()
                return
            except LinkLostError:
                time.sleep(_POLL_SECONDS)
        raise RunError("the server's listening process did not start; its output says why")

    def nodes(self) -> list[NodeState]:
        """Returns every registered device."""
        found = self._call(self._control.ListNodes, ListNodesRequest()).nodes_info
        return [
            NodeState(
                node.node_id,
                node.public_key,
                node.status == NodeStatus.ONLINE and node.online_until > time.time(),
                node.online_until,
                bool(node.last_activated_at),
            )
            for node in found
            if node.status != NodeStatus.UNREGISTERED
        ]

    def register(self, name: str, public_key: bytes) -> None:
        """Registers a device, which may then connect."""
        self._call(self._control.RegisterNode, RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node_id: int) -> None:
        """Unregisters a device, whose next request is refused."""
        self._call(self._control.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def open_run(self, longest_answer: float, batch_bytes: int = MAX_BATCH_BYTES) -> RunGrid:
        """Starts a Flower run and takes its task.

        Args:
            longest_answer: seconds after which a device is given up, see `RunGrid`.
        """
        with self._acquiring:
            fab = Fab(hashlib.sha256(self._fab).hexdigest(), self._fab, {})
            started = self._call(self._control.StartRun, StartRunRequest(fab=fab_to_proto(fab)))
            while True:
                acquired = self._acquire()
                if acquired is None:
                    raise LinkLostError("the SuperLink did not assign the task of a run that it has just started")
                if acquired.task.run_id == started.run_id:
                    break
                self._refuse(acquired)
        return RunGrid(self._runtime_client(acquired.token), longest_answer, self._alive, batch_bytes)

    def refuse_foreign_runs(self) -> None:
        """Ends every run that another client started, without reading it."""
        with self._acquiring:
            while acquired := self._acquire():
                self._refuse(acquired)

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        return called(call, request, self._alive)

    def _acquire(self) -> AcquireTaskResponse | None:
        types = [TaskType.SERVER_APP, TaskType.SIMULATION, TaskType.AGENT_APP]
        acquired = self._call(self._runtime.AcquireTask, AcquireTaskRequest(supported_task_types=types))
        return acquired if acquired.token else None

    def _refuse(self, acquired: AcquireTaskResponse) -> None:
        task = acquired.task
        self._report(f"refused foreign run {task.run_id} (app {task.fab_hash[:16]}…): none of its code was run")
        client = self._runtime_client(acquired.token)
        try:
            refusal = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="this server runs its own app only")
            self._call(client.PushTaskOutput, refusal)
        finally:
            client.close()

    def _runtime_client(self, token: str) -> RuntimeHttpClient:
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor("fedtune-server"),
            _ControlInterceptor(self._key),
            RuntimeTokenHttpInterceptor(token),
        ]
        return RuntimeHttpClient.from_server_address(self._address, False, self._authority, interceptors)


class _ControlInterceptor:
    """Adds the control key, which the guard requires."""

    def __init__(self, key: str) -> None:
        self._key = key

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self._key
        return call_next(context)
