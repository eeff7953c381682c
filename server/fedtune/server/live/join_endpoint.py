"""The one call of a machine that is no device yet: it hands in its request to join, for the fleet's owner to approve.

    POST /v1/device/join    JoinRequest -> nothing

It lies between the guard and Flower's app. A request is small, signed with the very keys that it is about, and kept
under its code; no more than a thousand wait.
"""

from __future__ import annotations

import asyncio

from fedtune.core.errors import InputError, PeerError
from fedtune.core.manifest.joining import JOIN, MAX_REQUEST_BYTES, JoinRequest
from fedtune.flower.guard import App, Receive, Scope, Send, answer, whole_body
from fedtune.server.live.enrolled_devices import receive
from fedtune.server.live.server_home import ServerHome


class JoinEndpoint:
    """An ASGI application around Flower's application.

    Args:
        app: Flower's.
        home: the server's folder.
    """

    def __init__(self, app: App, home: ServerHome) -> None:
        self._app, self._home = app, home

    async def __call__(self, scope: Scope, incoming: Receive, send: Send) -> None:
        """Answers the call, and passes everything else on."""
        if scope["type"] != "http" or scope["path"] != JOIN:
            await self._app(scope, incoming, send)
            return
        body = await whole_body(incoming, MAX_REQUEST_BYTES)
        if body is None:
            await answer(send, 413)
            return
        try:
            await asyncio.to_thread(receive, self._home, JoinRequest.from_bytes(body))
        except PeerError:
            await answer(send, 400)
        except InputError:
            await answer(send, 409)
        else:
            await answer(send, 200)
