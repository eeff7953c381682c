"""The guard before Flower's API: the public socket serves devices, the private one the server's own processes.

Flower serves its whole API on one port, and any client of its control calls can start runs and revoke devices.
Therefore one server listens on two sockets, and an ASGI layer decides by the local socket of a connection, which no
header can forge:

    public      POST to exactly the calls in DEVICE_CALLS, with a body of known and bounded length, and with the public
                key of an enrolled device, which has signed path, time and body. Signatures can be checked only after a
                body was read, and slow bodies of clients without such a key, a megabyte each, would fill the memory
    private     on loopback; all calls, with the control key from the server's folder

All other requests get 404, as if the path did not exist.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Container, Mapping, MutableMapping
from typing import Any

from fedtune.core.manifest.joining import JOIN
from fedtune.core.manifest.joining import MAX_REQUEST_BYTES as MAX_JOIN_BYTES
from fedtune.core.protocol.device_calls import (
    ANNOUNCE,
    APPEND,
    BEAT,
    BRING,
    CONNECT,
    LEAVE,
    MAX_CALL_BYTES,
    READ_PART,
    TAKE,
)
from fedtune.core.protocol.model_requests import DESCRIBE, MAX_REQUEST_BYTES, READ
from fedtune.core.protocol.signed_requests import KEY_HEADER, is_signed

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CONTROL_HEADER = "fedtune-control"
REQUEST_SECONDS = 300.0  # a piece over 50 kbit/s takes a quarter of this

_SHORT_BYTES = 1024
DEVICE_CALLS: Mapping[str, int] = {
    **dict.fromkeys((CONNECT, BEAT, LEAVE, TAKE, READ_PART, ANNOUNCE), _SHORT_BYTES),
    **dict.fromkeys((BRING, APPEND), MAX_CALL_BYTES),
    **dict.fromkeys((DESCRIBE, READ), MAX_REQUEST_BYTES),
    JOIN: MAX_JOIN_BYTES,
}
"""The calls of devices, and the most bytes that a body can have, which is read before a signature is checked."""

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
        await asyncio.wait_for(self._pass(scope, receive, send), REQUEST_SECONDS)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_private(scope) or scope["path"] == JOIN:
            await self._app(scope, receive, send)
            return
        body = await whole_body(receive, DEVICE_CALLS[scope["path"]])
        if body is None or not is_signed(dict(scope["headers"]), scope["path"], body, time.time()):
            await answer(send, _UNKNOWN)
            return
        await self._app(scope, _again(body, receive), send)

    def _is_private(self, scope: Scope) -> bool:
        server = scope.get("server")
        return server is not None and tuple(server) == self._private

    def _refusal(self, scope: Scope) -> int | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._is_private(scope):
            shown = headers.get(CONTROL_HEADER.encode(), b"")
            return None if hmac.compare_digest(shown, self._control_key) else _NOT_FOUND
        # Flower routes by `path`, with escapes resolved; an exact match excludes tricks with dots.
        if scope["method"] != "POST" or scope["path"] not in DEVICE_CALLS or scope.get("root_path"):
            return _NOT_FOUND
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not length.isdigit():
            return _LENGTH_REQUIRED
        if len(length) > 10 or int(length) > DEVICE_CALLS[scope["path"]]:
            return _TOO_LARGE
        if not self._open:
            return _UNAVAILABLE
        if scope["path"] == JOIN:  # the device is to be enrolled yet, and signs its small body by itself
            return None
        return None if headers.get(KEY_HEADER.encode(), b"") in self._enrolled else _UNKNOWN


async def whole_body(receive: Receive, limit: int) -> bytes | None:
    """Returns a request's body; None if it has more bytes than the limit, or ends early."""
    parts, size, more = [], 0, True
    while more:
        event = await receive()
        if event["type"] != "http.request":
            return None
        part = event.get("body", b"")
        parts.append(part)
        size, more = size + len(part), event.get("more_body", False)
        if size > limit:
            return None
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns a channel that gives a body that was read already, and then what comes."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return first.pop() if first else await receive()

    return replay


async def answer(send: Send, status: int) -> None:
    """Sends a response with a status and no body."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
