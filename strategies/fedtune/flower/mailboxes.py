"""The messages that devices have not answered yet, as the listening process knows them; in memory and in unnamed files.

    mailboxes.send(node, message_id, payload_bytes)      # when the server sends a message
    letter = mailboxes.letter(node, message_id)          # when its device says something about it

Who asks knows how long an honest answer can be: a vote is a signature, and an update has the words of its segments. So
no answer takes more room than its request could give, and each message has one answer, which may be brought again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from fastapi import HTTPException
from flwr.app import Metadata

from fedtune.core.errors import PeerError
from fedtune.core.protocol.device_calls import MAX_PIECE_BYTES

OVER, TOO_LARGE = 403, 413
_KEPT = 16  # letters of a node whose answers are still taken


class StoredParts:
    """Large payloads of a message, on disk while devices read them; equal messages share one.

    Args:
        folder: folder of the file, which has no name and ends with the process.
    """

    def __init__(self, parts: Sequence[bytes], folder: Path) -> None:
        self.sizes = tuple(map(len, parts))
        self._starts = [0, *accumulate(self.sizes)]
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with the last letter that refers to it
        for part in parts:
            self._file.write(part)
        self._file.flush()

    def read(self, part: int, offset: int) -> bytes:
        """Returns the bytes of a payload from an offset on, one piece of them at most.

        Raises:
            PeerError: the payload has no byte there.
        """
        if part >= len(self.sizes) or offset >= self.sizes[part]:
            raise PeerError(f"no byte {offset} in part {part} of {self.sizes}")
        count = min(MAX_PIECE_BYTES, self.sizes[part] - offset)
        return os.pread(self._file.fileno(), count, self._starts[part] + offset)


class ArrivingAnswer:
    """A large answer while it arrives.

    Args:
        size: bytes that it will have.
        digest: SHA-256 of them.
        seconds: duration of the work, as the device says.
        folder: folder of the file, which has no name and ends with the process.
    """

    def __init__(self, size: int, digest: bytes, seconds: float, folder: Path) -> None:
        self.size, self.digest, self.seconds = size, digest, seconds
        self.received = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with its letter
        self._hash = hashlib.sha256()

    def append(self, offset: int, content: bytes) -> None:
        """Takes the next piece; one that begins elsewhere than where the last one ended changes nothing.

        Raises:
            HTTPException: it is longer than what was announced.
        """
        if offset != self.received:
            return
        if self.received + len(content) > self.size:
            raise HTTPException(TOO_LARGE)
        self._file.write(content)
        self._hash.update(content)
        self.received += len(content)

    def whole(self) -> bytes | None:
        """Returns the answer when all of it is here; None before.

        Raises:
            PeerError: it has another digest than announced.
        """
        if self.received < self.size:
            return None
        if self._hash.digest() != self.digest:
            raise PeerError("the answer's digest is not the announced one")
        self._file.seek(0)
        return self._file.read()


@dataclass
class Letter:
    """A message to a device, without an answer yet, or with one that may be brought again.

    Args:
        payload_bytes: largest number of bytes that the payload of an honest answer can have.
        asked: its metadata, once the device has taken it.
        parts: its payloads, where they are too large for one call.
        arriving: a large answer that is on its way.
        answered: digest of the answer; empty before.
        collected: whether the run has the answer.
    """

    payload_bytes: int
    asked: Metadata | None = None
    parts: StoredParts | None = None
    arriving: ArrivingAnswer | None = None
    answered: bytes = b""
    collected: bool = False

    def admit(self, size: int, digest: bytes) -> bool:
        """Returns whether an answer of this size and digest is new; False for the one that is here already.

        Raises:
            HTTPException: the message has another answer, or this one is larger than its request could give.
        """
        if self.answered:
            if self.answered != digest:
                raise HTTPException(OVER)
            return False
        if size > self.payload_bytes:
            raise HTTPException(TOO_LARGE)
        return True

    def close(self, digest: bytes) -> None:
        """Notes that the message is answered, and frees what it held."""
        self.answered, self.parts, self.arriving = digest, None, None


class Mailboxes:
    """The letters of all nodes; of a node that never answers the oldest are forgotten."""

    def __init__(self) -> None:
        self._letters: dict[int, OrderedDict[str, Letter]] = {}
        self._waiting: Counter[int] = Counter()
        self._leaving: set[int] = set()

    def send(self, node: int, message_id: str, payload_bytes: int) -> None:
        """Expects an answer to a message from now on."""
        letters = self._letters.setdefault(node, OrderedDict())
        letters[message_id] = Letter(payload_bytes)
        while len(letters) > _KEPT:
            letters.popitem(last=False)

    def announce(self, nodes: Sequence[int]) -> None:
        """Notes that each of these nodes has one more message to take, which is all here."""
        self._waiting.update(nodes)

    def take(self, node: int) -> bool:
        """Returns whether a message may wait for the node, and counts it as taken; without one, nothing is searched."""
        if not self._waiting[node]:
            del self._waiting[node]
            return False
        self._waiting[node] -= 1
        return True

    def letter(self, node: int, message_id: str) -> Letter:
        """Returns a message of the node.

        Raises:
            HTTPException: nobody waits for its answer, with the status by which a device knows that.
        """
        letters = self._letters.get(node)
        if letters is None or message_id not in letters:
            raise HTTPException(OVER)
        return letters[message_id]

    def come_back(self, node: int) -> bool:
        """Returns whether the node wanted to leave; it does not any more."""
        wanted = node in self._leaving
        self._leaving.discard(node)
        return wanted

    def leave(self, node: int) -> bool:
        """Returns whether the node can be gone at once; if not, `collect` says so when it can.

        Flower reports a node that is gone as unreachable without looking whether its answer is here. So a node stays
        until the run has collected its answers.
        """
        self._leaving.add(node)
        letters = self._letters.get(node, OrderedDict[str, Letter]())
        return not any(letter.answered and not letter.collected for letter in letters.values())

    def collect(self, node: int, message_id: str) -> bool:
        """Notes that the run has an answer; returns whether its node wanted to leave, and now can."""
        if node in self._letters and message_id in self._letters[node]:
            self._letters[node][message_id].collected = True
        return node in self._leaving and self.leave(node)
