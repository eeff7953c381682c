"""HTTP/1.1 connections of unauthenticated clients, bounded in number, bytes and time; both servers use them.

    uvicorn.Config(app, http=bounded_http(), h11_max_incomplete_event_size=MAX_HEAD_BYTES, ...)

An application sees a request only when its head is complete, so it cannot refuse earlier. The head is therefore bounded
here: in bytes, which uvicorn does not do with httptools, and in time, which it never does. Connections that send
nothing would otherwise use up the number that may be open at once. They are bounded by address, too: where one has too
many that have not asked yet, the oldest is closed. A client behind the same address asks at once, and is not affected.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 << 10


@dataclass(frozen=True)
class Patience:
    """The time and the number that a server grants to connections before their first request is complete.

    Args:
        silent_seconds: for the first byte.
        head_seconds: for the rest of the head, and for the head of each further request after its first byte.
        silent: number of connections of one address that have not made a request.
    """

    silent_seconds: float = 5.0
    head_seconds: float = 30.0
    silent: int = 16


def bounded_http(patience: Patience | None = None) -> type[H11Protocol]:
    """Returns the protocol of one server's connections."""
    members = {"patience": patience or Patience(), "waiting": {}}
    return type("BoundedHttp", (_BoundedHttp,), members)


class _BoundedHttp(H11Protocol):
    """Closes a connection that has no complete request in time, or too many of its kind beside it.

    Between requests uvicorn's `timeout_keep_alive` applies.
    """

    patience: ClassVar[Patience]
    waiting: ClassVar[dict[str, dict[_BoundedHttp, None]]]  # address -> connections without a request, oldest first
    _silent: bool = True
    _stale: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the timer, and closes the oldest connection without a request where an address has too many."""
        super().connection_made(cast(asyncio.Transport, transport))
        beside = self.waiting.setdefault(_address(self.client), {})
        beside[self] = None
        if len(beside) > self.patience.silent:
            oldest = next(iter(beside))
            oldest._leave()  # now, since asyncio tells it of its end only later, and others may come before that
            oldest.transport.abort()
        self._limit(self.patience.silent_seconds)

    def data_received(self, data: bytes) -> None:
        """Stops the timer once a request is being answered, and starts it with the next request's first byte."""
        if self._silent:
            self._silent = False
            self._stop()
        super().data_received(data)
        if self.cycle is not None:
            self._leave()
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop()
        elif self._stale is None:
            self._limit(self.patience.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._leave()
        self._stop()
        super().connection_lost(exc)

    def _leave(self) -> None:
        address = _address(self.client)
        beside = self.waiting.get(address, {})
        beside.pop(self, None)
        if not beside:
            self.waiting.pop(address, None)

    def _limit(self, seconds: float) -> None:
        self._stale = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._stale is not None:
            self._stale.cancel()
            self._stale = None


def _address(client: tuple[str, int] | None) -> str:
    """Returns the address that one party has to itself: of IPv6 the network, whose other addresses are its own too."""
    host = client[0] if client else ""
    if ":" not in host:
        return host
    return str(ipaddress.ip_network(f"{host.partition('%')[0]}/64", strict=False))
