"""Identity across rounds: a device's long-lived key, the roster that it pins, and the log of the last round it served.

The whole protocol relies on the roster: a device must receive it from the person who enrols the fleet, not from the
server of the round. The author of a roster could enrol clients that do not exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import sync_directory, write_private
from fedtune.core.secagg.primitives import KEY_BYTES, Random, Secret, digest

MAX_LOG_BYTES = 1 << 20
_MARK_BYTES = 40  # bytes by which one mark may grow
MAX_NAME = 128


class Identity:
    """The Ed25519 key that identifies a device [RFC 8032]. It is made once and kept on the device."""

    def __init__(self, private: bytes) -> None:
        self._private = Secret(private)
        self.public = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: Random = os.urandom) -> Identity:
        return cls(random(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Reads a key that `save` wrote.

        Raises:
            InputError: the file does not exist, others may read it, or it does not hold a key.
        """
        try:
            if path.stat().st_mode & 0o077:
                raise InputError(f"{path}: an identity key must be readable by its owner only; run: chmod 600 {path}")
            with path.open("rb") as file:
                private = bytes.fromhex(file.read(2 * KEY_BYTES + 2).decode("ascii").strip())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot read an identity key: {_reason(error)}") from None
        if len(private) != KEY_BYTES:
            raise InputError(f"{path}: an identity key has {2 * KEY_BYTES} hexadecimal digits")
        return cls(private)

    def save(self, path: Path) -> None:
        """Writes the key as one line of hexadecimal digits, readable by the owner only, atomically."""
        write_private(path, self._private.value.hex() + "\n")
        sync_directory(path.parent)

    def sign(self, statement: bytes) -> bytes:
        """Returns the signature over a statement made by `framed`, whose label is the domain tag."""
        return Ed25519PrivateKey.from_private_bytes(self._private.value).sign(statement)

    def __repr__(self) -> str:
        return f"Identity(public={self.public.hex()})"


@dataclass(frozen=True)
class Roster:
    """The public identity key of every enrolled device, by client name.

    Raises:
        InputError: a name or key is malformed, or two clients have the same key, so that one device would count twice.
    """

    keys: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        seen: dict[bytes, str] = {}
        for client, key in self.keys.items():
            if not 0 < len(client) <= MAX_NAME:
                raise InputError(f"roster: a client's name has 1 to {MAX_NAME} characters, got {len(client)}")
            if len(key) != KEY_BYTES:
                raise InputError(f"roster: the key of {client} has {len(key)} bytes, expected {KEY_BYTES}")
            if key in seen:
                raise InputError(f"roster: {seen[key]} and {client} have the same key")
            seen[key] = client

    def verify(self, client: str, statement: bytes, signature: bytes) -> bool:
        """Returns whether this client signed the statement; False for a client that is not in the roster."""
        key = self.keys.get(client)
        if key is None:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
        except (InvalidSignature, ValueError):
            return False
        return True

    @property
    def digest(self) -> bytes:
        """A hash of the whole roster, for people to compare over another channel."""
        return digest("roster", *(part for name in sorted(self.keys) for part in (name.encode(), self.keys[name])))


class RoundMark(NamedTuple):
    """The number of a round and of an attempt at it; later marks compare greater."""

    round: int
    attempt: int


class RoundLog(Protocol):
    """The log of the last round in which a client took part, by job, across restarts."""

    def last(self, job: str) -> RoundMark | None:
        """Returns the last mark recorded for the job."""

    def record(self, job: str, mark: RoundMark) -> None:
        """Records the mark; a log on disk must be written before this returns."""


class MemoryRoundLog:
    """A round log in memory, for clients that exist only as long as their process, in simulations and tests."""

    def __init__(self) -> None:
        self._marks: dict[str, RoundMark] = {}

    def last(self, job: str) -> RoundMark | None:
        return self._marks.get(job)

    def record(self, job: str, mark: RoundMark) -> None:
        self._marks[job] = mark


class FileRoundLog:
    """A round log in one JSON file, replaced atomically; a crash leaves the old or the new one.

    A file that cannot be read is an error, never an empty log, since a forgotten round would help an attacker. The
    number of jobs in it is limited, so that a server that names ever more jobs cannot make it too large to be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def last(self, job: str) -> RoundMark | None:
        return self._read().get(job)

    def record(self, job: str, mark: RoundMark) -> None:
        marks = self._read()
        content = json.dumps({**marks, job: mark}) + "\n"
        if job not in marks and len(content) + _MARK_BYTES * len(marks) > MAX_LOG_BYTES:
            raise InputError(f"{self._path}: the round log is full after {len(marks)} jobs; leave and join again")
        write_private(self._path, content)
        sync_directory(self._path.parent)

    def _read(self) -> dict[str, RoundMark]:
        if not self._path.exists():
            return {}
        content = _read_json(self._path, MAX_LOG_BYTES, "round log")
        if not isinstance(content, dict) or not all(map(_is_mark, content.values())):
            raise InputError(f"{self._path}: a round log is one JSON object of job to [round, attempt]")
        return {job: RoundMark(*mark) for job, mark in content.items()}


def _is_mark(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def _read_json(path: Path, limit: int, what: str) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"{path}: a {what} has at most {limit} bytes")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read a {what}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (error.strerror or "unknown reason") if isinstance(error, OSError) else "its content is malformed"
