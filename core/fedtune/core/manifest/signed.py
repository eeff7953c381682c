"""Statements that a fleet's owner has signed, as JSON: a kind, a content, and an Ed25519 signature over both.

    data = Signed.sign(key, "job manifest", content).to_bytes()
    content = Signed.read(data, "job manifest", limit).checked(fleet_key)

The signature covers the kind, so that a statement of one kind is none of another, and the content as canonical JSON:
keys sorted, no spaces, so that the same content has one form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedtune.core.errors import PeerError
from fedtune.core.secagg.identity import Identity
from fedtune.core.secagg.primitives import framed


@dataclass(frozen=True)
class Signed:
    """A signed statement.

    Args:
        kind: what the statement is, such as "job manifest".
        content: JSON object.
        signature: 64 bytes.
    """

    kind: str
    content: dict[str, Any]
    signature: bytes = field(repr=False)

    @classmethod
    def sign(cls, key: Identity, kind: str, content: dict[str, Any]) -> Signed:
        """Signs a content with the fleet key."""
        return cls(kind, content, key.sign(_statement(kind, content)))

    @classmethod
    def read(cls, data: bytes, kind: str, limit: int) -> Signed:
        """Reads a statement; its signature is checked by `checked`.

        Raises:
            PeerError: the bytes are too many, or no statement of this kind.
        """
        if len(data) > limit:
            raise PeerError(f"a {kind} has at most {limit} bytes, got {len(data)}")
        try:
            value = json.loads(data)
            if not isinstance(value, dict) or set(value) != {"kind", "content", "signature"}:
                raise PeerError(f"a {kind} has kind, content and signature")
            if value["kind"] != kind or not isinstance(value["content"], dict):
                raise PeerError(f"expected a {kind}, got {str(value['kind'])[:80]!r}")
            return cls(kind, value["content"], bytes.fromhex(value["signature"]))
        except (ValueError, TypeError, RecursionError):
            raise PeerError(f"a {kind} cannot be read: it is no signed JSON") from None

    def checked(self, public: bytes) -> dict[str, Any]:
        """Returns the content if the signature is this key's.

        Raises:
            PeerError: it is not.
        """
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(self.signature, _statement(self.kind, self.content))
        except (InvalidSignature, ValueError, RecursionError):
            raise PeerError(f"the {self.kind} is not signed with this fleet's key") from None
        return self.content

    def to_bytes(self) -> bytes:
        """Returns the statement as one line of JSON."""
        value = {"kind": self.kind, "content": self.content, "signature": self.signature.hex()}
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _statement(kind: str, content: dict[str, Any]) -> bytes:
    return framed("statement of a fleet's owner", kind.encode(), json.dumps(content, sort_keys=True).encode())
