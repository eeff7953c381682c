"""A device's trust in its fleet's server: its pinned certificate authority, and the server's clock.

context = trusting(authority)
clock = ServerClock()
sign(clock.now()); clock.note(response.headers.get("date"))
if response.status_code == 401 and clock.correct(): sign(clock.now())
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime

MAX_CLOCK_ERROR = 2.0  # seconds by which a signed time may differ without being refused


def trusting(authority: bytes) -> ssl.SSLContext:
    """Returns a TLS context that trusts only one certificate authority, PEM, and checks certificate and host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context


class ServerClock:
    """The server's time, as this device estimates it.

    Args:
        local: returns the time of this device's own clock, seconds since 1970.
    """

    def __init__(self, local: Callable[[], float] = time.time) -> None:
        self._local = local
        self._measured = 0.0
        self.ahead = 0.0
        """Seconds by which this device's clock is ahead of the server's; 0 where no correction was needed."""

    def now(self) -> float:
        """Returns seconds since 1970."""
        return self._local() - self.ahead

    def note(self, date: str | None) -> None:
        """Measures the difference of the clocks by the date of a server's answer."""
        if date:
            with suppress(ValueError):  # a proxy may send a malformed date
                self._measured = self._local() - parsedate_to_datetime(date).timestamp()

    def correct(self) -> bool:
        """Adopts the last measured difference to the server's clock; returns False if it was in use already."""
        if abs(self._measured - self.ahead) <= MAX_CLOCK_ERROR:
            return False
        self.ahead = self._measured
        return True
