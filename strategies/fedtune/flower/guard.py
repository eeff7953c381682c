"""The guard before Flower's API: the public socket serves devices, the private one the server's own processes.

Flower serves its whole API on one port, and any client of its control calls can start runs and revoke devices.
Therefore one server listens on two sockets, and an ASGI layer decides by the local socket of a connection, which no
header can forge:

    public      POST to exactly the calls in DEVICE_CALLS, with a body of known and bounded length, and with the public
                key of an enrolled device. Signatures can be checked only after a body was read, and slow bodies of
                unauthenticated clients, a megabyte each, would fill the memory
    private     on loopback; all calls, with the control key from the server's folder

All other requests get 404, as if the path did not exist.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedtune.core.protocol.bundles import BRING, TAKE
from fedtune.core.protocol.model_requests import DESCRIBE, READ

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CONTROL_HEADER = "fedtune-control"
MAX_BODY_BYTES = 1 << 20  # pieces of objects are far smaller; bodies are parsed before signatures are checked
REQUEST_SECONDS = 300.0  # a piece over 50 kbit/s takes a quarter of this

DEVICE_CALLS = frozenset({DESCRIBE, READ, TAKE, BRING}) | frozenset(
    f"/v1/fleet/{call}"  # Flower's
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)

_KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
_UNKNOWN, _NOT_FOUND, _LENGTH_REQUIRED, _TOO_LARGE, _UNAVAILABLE = 401, 404, 411, 413, 503


class Guard:
    """An ASGI application around Flower's.

    Args:
        app: Flower's.
        private: (host, port) of the private socket, as `getsockname` returns it.
        control_key: key that requests on the private socket must carry.
        enrolled: public keys of enrolled devices, as requests carry them.
    """

    def __init__(self, app: App, private: tuple[str, int], control_key: str, enrolled: Container[bytes]) -> None:
        self._app = app
        self._enrolled = enrolled
        self._private = private
        self._control_key = control_key.encode()
        self._open = False

    def open(self) -> None:
        """Opens the public socket to devices; before, they are told to retry later."""
        self._open = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on to the application, or answers it with a status alone."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await answer(send, refusal)
            return
        # After a timeout the server closes the connection without an answer.
        await asyncio.wait_for(self._app(scope, receive, send), REQUEST_SECONDS)

    def _refusal(self, scope: Scope) -> int | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        server = scope.get("server")
        if server is not None and tuple(server) == self._private:
            shown = headers.get(CONTROL_HEADER.encode(), b"")
            return None if hmac.compare_digest(shown, self._control_key) else _NOT_FOUND
        # Flower routes by `path`, with escapes resolved; an exact match excludes tricks with dots.
        if scope["method"] != "POST" or scope["path"] not in DEVICE_CALLS or scope.get("root_path"):
            return _NOT_FOUND
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not length.isdigit():
            return _LENGTH_REQUIRED
        if len(length) > 10 or int(length) > MAX_BODY_BYTES:
            return _TOO_LARGE
        if not self._open:
            return _UNAVAILABLE
        if scope["path"] in (DESCRIBE, READ):  # with signatures of their own, and small bodies
            return None
        return None if headers.get(_KEY_HEADER, b"") in self._enrolled else _UNKNOWN


async def answer(send: Send, status: int) -> None:
    """Sends a response with a status and no body."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
