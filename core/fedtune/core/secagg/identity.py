"""Identity across rounds: a device's long-lived key, and the roster that it pins.

The whole protocol relies on the roster: a device must receive it from the person who enrols the fleet, not from the
server of the round. The author of a roster could enrol clients that do not exist.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import sync_directory, write_private
from fedtune.core.secagg.primitives import KEY_BYTES, Random, Secret, digest

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


def _reason(error: Exception) -> str:
    return (error.strerror or "unknown reason") if isinstance(error, OSError) else "its content is malformed"
