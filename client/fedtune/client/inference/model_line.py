"""A device's line to the fleet's server, for exported models: signed requests over TLS, tried again after breaks.

line = ModelLine(server, authority, name, node_key)
offer = PatientLine(line, PAUSES).describe(job=None, form=None)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import httpx
from msgspec import structs

from fedtune.core.errors import FedtuneError, InputError, PeerError, RunError
from fedtune.core.host.trusted_server import ServerClock, trusting
from fedtune.core.protocol.enrolment import load_node_key
from fedtune.core.protocol.messages import PROTOCOL_VERSION, Payload, decode, encode
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_DESCRIPTION_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
    sign_request,
)
from fedtune.core.text import one_line

CALL_SECONDS = 30.0  # without a single byte
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds between tries; after the last, the pull gives up for now
_MAX_TEXT = 2000
_CHUNK = 64 << 10


class LineError(FedtuneError):
    """The server cannot be reached now; it may be reached later."""


class Line(Protocol):
    """Answers a pull's requests: `ModelLine`, or a test's own."""

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Returns what there is, as `ModelLine.describe`."""

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Returns a piece of a file, as `ModelLine.read`."""


class ModelLine:
    """A device's signed requests for models.

    Args:
        server: HOST:PORT.
        authority: the only certificate authority that is trusted, PEM.
        device: the name it was enrolled under.
        node_key: private key of the device, PEM.
        clock: the server's, as far as it is known.
    """

    def __init__(
        self, server: str, authority: bytes, device: str, node_key: str, clock: ServerClock | None = None
    ) -> None:
        self._client = httpx.Client(base_url=f"https://{server}", verify=trusting(authority), timeout=CALL_SECONDS)
        self._device, self._key = device, load_node_key(node_key)
        self._clock = clock or ServerClock()

    def close(self) -> None:
        """Gives the connection back."""
        self._client.close()

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Asks for the offer of a model.

        Raises:
            InputError: it has no such model, or does not know this device.
            PeerError: it answers with something else.
            LineError: it cannot be reached.
        """
        with self._ask(DESCRIBE, DescribeModel(PROTOCOL_VERSION, job, form)) as response:
            content = bytearray()
            for chunk in response.iter_bytes(_CHUNK):
                content += chunk
                if len(content) > MAX_DESCRIPTION_BYTES:
                    raise PeerError(f"the server's offer is larger than {MAX_DESCRIPTION_BYTES:,} bytes")
        return decode(bytes(content), ModelDescription, MAX_DESCRIPTION_BYTES)

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """A piece of a file, as it comes in; never more than was asked for.

        Raises:
            InputError, PeerError, LineError: as `describe`.
        """
        left = wanted.size
        with self._ask(READ, wanted) as response:
            for chunk in response.iter_bytes(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise PeerError(f"{wanted.file}: the server sent more than was asked for")
                yield chunk

    @contextmanager
    def _ask(self, path: str, payload: Payload) -> Iterator[httpx.Response]:
        body = encode(payload)
        try:
            with self._send(path, body) as response:
                self._clock.note(response.headers.get("date"))
                if response.status_code != 401 or not self._clock.correct():
                    _check(response)
                    yield response
                    return
            with self._send(path, body) as response:
                _check(response)
                yield response
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            trust = "certificate" in reason.lower()
            raise LineError(f"the server {'is not trusted' if trust else 'cannot be reached'}: {reason}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PeerError(f"the server's answer cannot be read: {error}") from error

    @contextmanager
    def _send(self, path: str, body: bytes) -> Iterator[httpx.Response]:
        headers = sign_request(self._key, self._device, path, int(self._clock.now()), body)
        # Not compressed on the way: what arrives is counted against what was asked for.
        with self._client.stream("POST", path, content=body, headers={**headers, "accept-encoding": "identity"}) as got:
            yield got


@dataclass(frozen=True)
class PatientLine:
    """A line that is tried again after each break, with longer and longer pauses."""

    line: Line
    pauses: Sequence[float]

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Returns the offer, whatever the line does meanwhile."""
        failures = 0
        while True:
            try:
                return self.line.describe(job, form)
            except LineError as error:
                self._pause(failures, error)
                failures += 1

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Yields the piece, whatever the line does: after a break it goes on where it was."""
        got = failures = 0
        while got < wanted.size:
            rest = structs.replace(wanted, offset=wanted.offset + got, size=wanted.size - got)
            try:
                for chunk in self.line.read(rest):
                    got += len(chunk)
                    failures = 0
                    yield chunk
                if got < wanted.size:
                    raise LineError(f"{wanted.file}: the server sent less than was asked for")
            except LineError as error:
                self._pause(failures, error)
                failures += 1

    def _pause(self, failures: int, error: LineError) -> None:
        if failures >= len(self.pauses):
            raise RunError(f"{error}; what has arrived is kept, go on with: fedtune client pull") from error
        time.sleep(self.pauses[failures])


def _check(response: httpx.Response) -> None:
    """Makes sure that it is what was asked for.

    Raises:
        InputError, PeerError, LineError: what the server answered instead.
    """
    status = response.status_code
    if status == 200:
        return
    text = one_line(next(response.iter_bytes(_MAX_TEXT), b"").decode("utf-8", "replace")) if status < 500 else ""
    if status == 401:
        raise InputError("the server does not know this device; was it revoked?")
    if status == 404 and text:
        raise InputError(text)
    if status in (404, 405):
        raise PeerError("what answers at this address offers no models; does the server run this fedtune version?")
    if status < 500:
        raise PeerError(f"the server refuses the request with status {status}: {text}")
    raise LineError(f"the server answered {status}")
