"""HTTP/1.1 connections of unauthenticated clients, bounded in bytes and time, for the fleet's and the model's server.

    uvicorn.Config(app, http=BoundedHttp, h11_max_incomplete_event_size=MAX_HEAD_BYTES, ...)

An application sees a request only when its head is complete, so it cannot refuse earlier. The head is therefore bounded
here: in bytes, which uvicorn does not do with httptools, and in time, which it never does. Idle connections would
otherwise use up the number of connections that may be open at once.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30.0


class BoundedHttp(H11Protocol):
    """Closes a connection if the head of a request is not complete in time after its first byte.

    The time of the first request begins with the connection. Between requests uvicorn's `timeout_keep_alive` applies.
    """

    head_seconds: ClassVar[float] = HEAD_SECONDS
    _stale: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the timer."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stops the timer once a request is being answered, and starts it with the next request's first byte."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop()
        elif self._stale is None:
            self._stale = self.loop.call_later(self.head_seconds, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._stale is not None:
            self._stale.cancel()
            self._stale = None
