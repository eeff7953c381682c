"""A device's link to the model registry of the fleet's server: signed requests over TLS, with retries.

line = ModelLine(server, authority, node_key)
offer = PatientLine(line).describe(job=None, form=None)
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
from fedtune.core.manifest.joining import load_node_key
from fedtune.core.protocol.messages import PROTOCOL_VERSION, Payload, decode, encode
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_DESCRIPTION_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
)
from fedtune.core.protocol.signed_requests import sign
from fedtune.core.text import one_line

CALL_SECONDS = 30.0  # limit without a single byte
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds between tries; after the last one the pull gives up
_MAX_TEXT = 2000
_CHUNK = 64 << 10


class LineError(FedtuneError):
    """The server cannot be reached now, and may be reachable later."""


class Line(Protocol):
    """The interface to a model registry: `ModelLine`, or a test's own."""

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Returns the registry's offer, as `ModelLine.describe` does."""

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Yields a piece of a file, as `ModelLine.read` does."""


class ModelLine:
    """Sends a device's signed requests for models.

    Args:
        server: HOST:PORT.
        authority: PEM certificate authority, the only trusted one.
        node_key: private key of the device, PEM.
        clock: estimate of the server's clock.
    """

    def __init__(self, server: str, authority: bytes, node_key: str, clock: ServerClock | None = None) -> None:
        self._client = httpx.Client(base_url=f"https://{server}", verify=trusting(authority), timeout=CALL_SECONDS)
        self._key = load_node_key(node_key)
        self._clock = clock or ServerClock()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Requests the offer of a model.

        Raises:
            InputError: the server has no such model, or does not know this device.
            PeerError: the answer is not an offer.
            LineError: the server cannot be reached.
        """
        with self._ask(DESCRIBE, DescribeModel(PROTOCOL_VERSION, job, form)) as response:
            content = bytearray()
            for chunk in response.iter_bytes(_CHUNK):
                content += chunk
                if len(content) > MAX_DESCRIPTION_BYTES:
                    raise PeerError(f"the server's offer is larger than {MAX_DESCRIPTION_BYTES:,} bytes")
        return decode(bytes(content), ModelDescription, MAX_DESCRIPTION_BYTES)

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Yields a piece of a file as it arrives; never more than requested.

        Raises:
            InputError, PeerError, LineError: as in `describe`.
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
        headers = sign(self._key, path, self._clock.now(), body)
        # Without compression, so that the received bytes can be counted against the requested ones.
        with self._client.stream("POST", path, content=body, headers={**headers, "accept-encoding": "identity"}) as got:
            yield got


@dataclass(frozen=True)
class PatientLine:
    """Retries another line after each failure.

    Args:
        pauses: seconds between tries; after the last one it gives up.
    """

    line: Line
    pauses: Sequence[float] = PAUSES

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Returns the offer, in spite of interruptions."""
        failures = 0
        while True:
            try:
                return self.line.describe(job, form)
            except LineError as error:
                self._pause(failures, error)
                failures += 1

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Yields the piece, and resumes it where it was after an interruption."""
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
    """Raises unless the response is the requested one.

    Raises:
        InputError, PeerError, LineError: the server answered with an error, or with a compressed body, which could be
            any number of times as long as what arrives.
    """
    status = response.status_code
    if (coding := response.headers.get("content-encoding", "identity")) != "identity":
        raise PeerError(f"the server's answer is compressed ({coding[:40]!r}); expected none of that")
    if status == 200:
        return
    text = one_line(next(response.iter_bytes(_MAX_TEXT), b"").decode("utf-8", "replace")) if status < 500 else ""
    if status == 401:
        raise InputError("the server does not know this device; was it revoked?")
    if status == 404 and text:
        raise InputError(text)
    if status in (404, 405):
        raise PeerError("the server at this address offers no models; does it run this fedtune version?")
    if status < 500:
        raise PeerError(f"the server refuses the request with status {status}: {text}")
    raise LineError(f"the server answered {status}")
