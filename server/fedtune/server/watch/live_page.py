"""The live page: one HTML file, and the stream of server-sent events that keeps it current.

    with WatchServer(page_routes(live), "127.0.0.1:0") as url: ...

The page loads nothing else and works without a network. Its content security policy admits its own script, by its
digest, and connections to where it came from; a browser then runs no other script, in case a client's text should ever
get past the page, which shows text as text.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from hashlib import sha256
from importlib.resources import files

from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedtune.server.report.page import render
from fedtune.server.watch.live_run import LiveRun, Seen

LOOK_SECONDS = 0.5  # between two looks for news; a page shows a round within a second of its end
QUIET_SECONDS = 15.0  # after which an empty comment shows that the connection is alive
MAX_PAGES = 16

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes(live: LiveRun) -> list[Route]:
    """Returns / with the page, and /events with its news."""
    script = files(__package__).joinpath("live.js").read_text(encoding="utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    page = render("live.html.j2", title="live", script=script, script_digest=digest)
    stream = _Stream(live)
    return [
        Route("/", lambda _: HTMLResponse(page, headers=_HEADERS), methods=["GET"]),
        Route("/events", stream.open, methods=["GET"]),
    ]


class _Stream:
    """The pages that are open, and their news."""

    def __init__(self, live: LiveRun) -> None:
        self._live, self._open = live, 0

    async def open(self, request: Request) -> Response:
        """Answers with the whole state, and then with each change."""
        if self._open >= MAX_PAGES:
            return PlainTextResponse(f"{MAX_PAGES} pages are open already; close one\n", 503)
        return StreamingResponse(self._news(request.app.state), media_type="text/event-stream", headers=_HEADERS)

    async def _news(self, state: State) -> AsyncIterator[str]:
        self._open += 1
        try:
            seen, quiet = Seen(), 0.0
            while not state.ending:
                if message := self._live.changes(seen):
                    yield f"data: {json.dumps(message, allow_nan=False, default=str)}\n\n"
                    quiet = 0.0
                elif quiet >= QUIET_SECONDS:
                    yield ":\n\n"
                    quiet = 0.0
                await asyncio.sleep(LOOK_SECONDS)
                quiet += LOOK_SECONDS
        finally:
            self._open -= 1
