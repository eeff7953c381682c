"""The HTTP server for people and programs that look at a run: on this machine, unless its operator says otherwise.

    with WatchServer([*page_routes(live), metrics_route(metrics)], "127.0.0.1:9464") as url:
        ...

It changes nothing, and answers GET alone. A browser may be on this machine as well, with pages of anybody: a request
whose Host is a foreign name (a page that has bent its own name to this address), or that a page of another origin
makes, is refused.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from fedtune.core.errors import InputError
from fedtune.core.host.connections import MAX_HEAD_BYTES, bounded_http

LOOPBACK = "127.0.0.1"
MAX_CONNECTIONS = 64
_STOP_SECONDS = 2.0
_OWN_SITES = (None, "none", "same-origin")  # of the header Sec-Fetch-Site: no browser, typed in, a page of ours


def parse_address(text: str) -> tuple[str, int]:
    """Returns host and port of PORT or HOST:PORT; without a host it is this machine's own.

    Raises:
        InputError: the text is neither.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or LOOPBACK
    if not port.isdecimal() or not int(port) < 65536 or not host.isprintable() or " " in host:
        raise InputError(f"{text[:80]!r}: expected PORT or HOST:PORT, for example 9464 or 0.0.0.0:9464")
    return host, int(port)


class OwnPagesOnly:
    """Passes on requests that are meant for this server, and that no page of another origin makes.

    Args:
        host: the name at which it is asked, beside addresses and localhost.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http" and (reason := self._refusal(Headers(scope=scope))):
            await PlainTextResponse(f"{reason}\n", 403, {"connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return f"expected an address, localhost or {self._host} as the host"
        origins = headers.getlist("origin")
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return "a page of another origin asks"
        return "" if headers.get("sec-fetch-site") in _OWN_SITES else "a page of another site asks"

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"http://{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self._host):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class WatchServer:
    """Serves routes in a thread of its own. Use as a context manager, which gives its URL.

    Raises:
        InputError: the address cannot be used.
    """

    def __init__(self, routes: Sequence[BaseRoute], address: str) -> None:
        self._host, self._port = parse_address(address)
        self._app = Starlette(routes=routes)
        self._app.state.ending = False  # answers that go on look at it
        config = uvicorn.Config(
            OwnPagesOnly(self._app, self._host),
            log_config=None,  # its own would replace the handlers of the whole process
            log_level="warning",
            access_log=False,
            http=bounded_http(),
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=1,
            lifespan="off",
        )
        self._server = uvicorn.Server(config)

    def __enter__(self) -> str:
        """Listens, and returns the URL."""
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.create_server((self._host, self._port), family=family)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise InputError(f"cannot listen on {self._host}:{self._port}: {reason}; choose another port") from None
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True, name="watch"
        )
        self._thread.start()
        shown = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{shown}:{self._listener.getsockname()[1]}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._app.state.ending = True
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)
        self._listener.close()
