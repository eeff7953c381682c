"""A device's link to the model registry of the fleet's server, with retries.

line = ModelLine(SignedHttp(server, authority, node_key, ServerClock()))
offer = PatientLine(line).describe(job=None, form=None)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import structs

from fedtune.client.live.signed_http import NothingThereError, SignedHttp, UnreachableError
from fedtune.core.errors import InputError, PeerError, RunError
from fedtune.core.protocol.messages import PROTOCOL_VERSION, Payload, decode, encode
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_DESCRIPTION_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
)

CALL_SECONDS = 30.0  # limit without a single byte
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds between tries; after the last one the pull gives up


class Line(Protocol):
    """The interface to a model registry: `ModelLine`, or a test's own."""

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Returns the registry's offer, as `ModelLine.describe` does."""

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Yields a piece of a file, as `ModelLine.read` does."""


class ModelLine:
    """Sends a device's requests for models.

    Args:
        http: the device's link to its server.
    """

    def __init__(self, http: SignedHttp) -> None:
        self._http = http

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """Requests the offer of a model.

        Raises:
            InputError: the server has no such model.
            PeerError, UnknownDeviceError, UnreachableError: as in `SignedHttp.stream`, or the answer is not an offer.
        """
        said = self._ask(DESCRIBE, DescribeModel(PROTOCOL_VERSION, job, form), MAX_DESCRIPTION_BYTES)
        return decode(b"".join(said), ModelDescription, MAX_DESCRIPTION_BYTES)

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """Yields a piece of a file as it arrives; never more than requested; raises as `describe`."""
        return self._ask(READ, wanted, wanted.size)

    def _ask(self, path: str, payload: Payload, limit: int) -> Iterator[bytes]:
        try:
            yield from self._http.stream(path, encode(payload), limit, CALL_SECONDS)
        except NothingThereError as error:
            if error.reason:
                raise InputError(error.reason) from None
            raise PeerError("the server at this address offers no models; does it run this fedtune version?") from None


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
            except UnreachableError as error:
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
                    raise UnreachableError(f"{wanted.file}: the server sent less than was asked for")
            except UnreachableError as error:
                self._pause(failures, error)
                failures += 1

    def _pause(self, failures: int, error: UnreachableError) -> None:
        if failures >= len(self.pauses):
            raise RunError(f"{error}; what has arrived is kept, go on with: fedtune client pull") from error
        time.sleep(self.pauses[failures])
