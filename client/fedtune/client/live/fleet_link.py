"""A device's link to its server: it takes messages and brings answers, by the calls in `core.protocol.device_calls`.

    link = FleetLink(server, authority, node_key)
    link.connect()
    task = link.take()
    request = link.fetch(task)
    link.answer(task, Answer(payload, seconds))

There is no open port, and no code from the server. Messages enter and leave the link as plain values.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass

from msgspec import structs

from fedtune.client.live.signed_http import NotAdmittedError, SignedHttp, UnreachableError
from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.host.clock import SYSTEM_CLOCK, Backoff, Clock
from fedtune.core.host.trusted_server import ServerClock
from fedtune.core.protocol.device_calls import (
    ANNOUNCE,
    APPEND,
    BEAT,
    BRING,
    CONNECT,
    LEAVE,
    MAX_CALL_BYTES,
    MAX_PIECE_BYTES,
    MAX_REASON,
    READ_PART,
    TAKE,
    AnnounceAnswer,
    AppendPiece,
    Assignment,
    BringAnswer,
    ReadPart,
    Received,
    Refused,
    Taken,
)
from fedtune.core.protocol.messages import MAX_PAYLOAD_BYTES, Payload, Refusal, Request, decode, encode, parts_of

BEAT_CALL_SECONDS = 12.0
PIECE_SECONDS = 240.0  # for a piece, up or down, over a very slow link
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (16 << 20)  # a payload and a configuration
_FETCH_SECONDS = 600.0
_BACKOFF_SECONDS = (0.05, 5.0)


@dataclass(frozen=True)
class Answer:
    """A device's answer to a message.

    Args:
        outcome: the payload, or a refusal.
        seconds: duration of the work.
    """

    outcome: bytes | Refusal
    seconds: float


class FleetLink:
    """A device's link to its server.

    Args:
        server: HOST:PORT.
        authority: PEM certificate authority, the only trusted one.
        node_key: private key of the device, PEM.
        server_clock: estimate of the server's clock.
        message_bytes: limit on the bytes of a message in pieces.
        clock: for pauses between tries.
    """

    def __init__(
        self,
        server: str,
        authority: bytes,
        node_key: str,
        server_clock: ServerClock | None = None,
        message_bytes: int = MAX_MESSAGE_BYTES,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._http = SignedHttp(server, authority, node_key, server_clock or ServerClock())
        self._message_bytes = message_bytes
        self._clock = clock

    @property
    def public_key(self) -> bytes:
        """The public key that identifies requests, PEM."""
        return self._http.public_key

    @property
    def clock_error(self) -> float:
        """Seconds by which this device's clock is ahead of the server's, as far as it was corrected."""
        return self._http.clock.ahead

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def connect(self) -> None:
        """Tells the server that this device is online.

        Raises:
            UnknownDeviceError, NotAdmittedError, UnreachableError, UntrustedError.
        """
        self._http.post(CONNECT, b"")

    def leave(self) -> None:
        """Tells the server that this device is offline; ignores failures."""
        with suppress(FedtuneError):
            self._http.post(LEAVE, b"", BEAT_CALL_SECONDS)

    def beat(self) -> bool:
        """Sends a heartbeat; returns False if the server no longer counts this device as online."""
        try:
            self._http.post(BEAT, b"", BEAT_CALL_SECONDS)
        except NotAdmittedError:
            return False
        return True

    def take(self) -> Assignment | None:
        """Returns a waiting message, or None.

        Raises:
            PeerError: the response is no message, or too large.
        """
        return decode(self._http.post(TAKE, b""), Taken, MAX_CALL_BYTES).assignment

    def fetch(self, task: Assignment) -> Request:
        """Downloads the message's content, as far as it did not come with it.

        Raises:
            PeerError: it is larger than this device accepts, or not what was announced.
            UnreachableError: it could not be had in time.
        """
        parts = task.parts
        if task.sizes:
            if sum(task.sizes) > self._message_bytes:
                raise PeerError(f"the message has more than {self._message_bytes} bytes")
            parts = tuple(self._part(task, part, size) for part, size in enumerate(task.sizes))
        if len(parts) != parts_of(task.action):
            raise PeerError(f"a message {task.action} of {len(parts)} parts; expected {parts_of(task.action)}")
        return Request(task.action, task.group, parts)

    def _part(self, task: Assignment, part: int, size: int) -> bytes:
        content, end, backoff = bytearray(), self._clock.monotonic() + _FETCH_SECONDS, Backoff(*_BACKOFF_SECONDS)
        while len(content) < size:
            try:
                piece = self._http.post(READ_PART, encode(ReadPart(task.message, part, len(content))), PIECE_SECONDS)
            except UnreachableError:
                if self._clock.monotonic() > end:
                    raise
                self._clock.sleep(backoff.next())
                continue
            if not 0 < len(piece) <= min(MAX_PIECE_BYTES, size - len(content)):
                raise PeerError(f"a piece of {len(piece)} bytes, where {size - len(content)} are missing")
            content += piece
        return bytes(content)

    def answer(self, task: Assignment, answer: Answer) -> None:
        """Uploads an answer; after a failure it goes on where it was, with the same answer.

        Raises:
            RunOverError: the server no longer waits for it.
            PeerError: the server refuses it.
            UnreachableError: try again.
        """
        outcome = answer.outcome
        if isinstance(outcome, Refusal):
            refused = Refused(outcome.reason[:MAX_REASON], outcome.sits_out)
            self._send(BRING, BringAnswer(task.message, answer.seconds, b"", refused))
        elif len(outcome) <= MAX_PIECE_BYTES:
            self._send(BRING, BringAnswer(task.message, answer.seconds, outcome))
        else:
            self._upload(task, outcome, answer.seconds)

    def _upload(self, task: Assignment, payload: bytes, seconds: float) -> None:
        digest = hashlib.sha256(payload).digest()
        said = self._send(ANNOUNCE, AnnounceAnswer(task.message, seconds, len(payload), digest))
        before = -1
        while (there := decode(said, Received, MAX_CALL_BYTES).size) < len(payload):
            if there <= before:
                raise UnreachableError("the server does not take the next piece of an answer")
            before = there
            said = self._send(APPEND, AppendPiece(task.message, there, payload[there : there + MAX_PIECE_BYTES]))

    def _send(self, path: str, payload: Payload) -> bytes:
        return self._http.post(path, encode(payload), PIECE_SECONDS)


def note_of(task: Assignment) -> bytes:
    """Returns the part of a message that an answer needs, as bytes; see `recalled`."""
    return encode(structs.replace(task, parts=(), sizes=()))


def recalled(note: bytes) -> Assignment:
    """Returns the message that an earlier process of this device worked on, as far as a refusal needs it.

    Raises:
        PeerError: the bytes are no message.
    """
    return decode(note, Assignment, MAX_CALL_BYTES)
