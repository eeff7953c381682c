"""Endpoints before Flower's, behind the guard: the calls of devices, and two of the server's own processes.

Each call is one transaction on Flower's state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import MAX_PAYLOAD_BYTES
from fedtune.flower.device_endpoints import DeviceCall, DeviceEndpoints
from fedtune.flower.guard import Receive, Scope, Send, answer, whole_body
from fedtune.flower.mailboxes import Mailboxes
from fedtune.flower.run_endpoints import RunCall, RunEndpoints

Call = Callable[[Scope, bytes, SqlLinkState], bytes]


class LinkEndpoints:
    """An ASGI application around Flower's.

    Args:
        app: Flower's.
        folder: folder for the unnamed files of large messages and answers.
    """

    def __init__(self, app: FastAPI, folder: Path) -> None:
        self._app = app
        mailboxes = Mailboxes()
        of_devices, of_runs = DeviceEndpoints(mailboxes, folder).calls, RunEndpoints(mailboxes).calls
        self._calls = {path: _of_device(call) for path, call in of_devices.items()}
        self._calls |= {path: self._of_run(call) for path, call in of_runs.items()}
        # SQLite has one writer at a time; more threads would wait for it by polling with long sleeps.
        self._worker = ThreadPoolExecutor(1, "link")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers these calls, and passes all others on."""
        call = self._calls.get(scope["path"]) if scope["type"] == "http" else None
        if call is None:
            await self._app(scope, receive, send)
            return
        body = await whole_body(receive, MAX_PAYLOAD_BYTES)  # the guard has bounded those of devices
        if body is None:
            return
        status, content = await asyncio.get_running_loop().run_in_executor(
            self._worker, self._answer, call, scope, body
        )
        if status != 200:
            await answer(send, status)
            return
        headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _answer(self, call: Call, scope: Scope, body: bytes) -> tuple[int, bytes]:
        state = self._app.state.linkstate_factory.state()
        try:
            with state.session():
                try:
                    return 200, call(scope, body, state)
                except FlowerError as error:  # keeps the cleanup that Flower did before it refused
                    return API_ERROR_MAP[error.code].http_status_code, b""
        except HTTPException as error:
            return error.status_code, b""
        except (PeerError, ValueError):
            return 400, b""

    def _of_run(self, call: RunCall) -> Call:
        return lambda scope, body, state: call(Request({**scope, "app": self._app, "state": {}}), body, state)


def _of_device(call: DeviceCall) -> Call:
    return lambda scope, body, state: call(dict(scope["headers"]), body, state)
