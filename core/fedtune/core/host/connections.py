"""HTTP/1.1 connections as both servers, the fleet's and the model's, take them from unauthenticated clients.

    uvicorn.Config(app, http=BoundedHttp, h11_max_incomplete_event_size=MAX_HEAD_BYTES, ...)

Before a request's head is whole, no application sees it and none can refuse it. So the head is bounded here, in bytes,
which uvicorn leaves open with httptools, and in time, which it leaves open altogether: connections that say nothing
would fill up the number that may be open at once.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30.0


class BoundedHttp(H11Protocol):
    """Closes a connection whose next request does not come whole, but for its body, in time after its first byte; the
    first request's time begins with the connection. Between requests uvicorn's `timeout_keep_alive` counts."""

    _stale: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The clock starts."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It stops once a request is being answered, and starts with the first byte of the one after it."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop()
        elif self._stale is None:
            self._stale = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._stale is not None:
            self._stale.cancel()
            self._stale = None
