"""The cryptographic primitives of the protocol: framing, hashes, key derivation, agreement, encryption, secrets.

Everything that is hashed, signed, authenticated or fed to a key derivation goes through `framed`, so that no two
different statements ever have the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16

PROTOCOL = "fedtune secure aggregation 1"

Random = Callable[[int], bytes]
"""Returns a number of unpredictable bytes: `os.urandom`, or a fixed stream for known-answer tests."""

_ONCE_ONLY_NONCE = bytes(12)  # a sealing key is derived for one direction of one pair in one round, and used once


class Secret:
    """Key material in its own memory, which `wipe` overwrites; its repr does not show it, so no log can contain it.

    Temporary copies of the interpreter or a library are out of reach; `wipe` erases the copy that would otherwise exist
    as long as the session.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytearray(value)

    @property
    def value(self) -> bytes:
        if not self._value:
            raise ValueError("this secret has been wiped")
        return bytes(self._value)

    def wipe(self) -> None:
        self._value[:] = bytes(len(self._value))
        self._value.clear()

    @property
    def wiped(self) -> bool:
        return not self._value

    def __repr__(self) -> str:
        return "Secret(wiped)" if self.wiped else "Secret(...)"


def framed(label: str, *parts: bytes | int) -> bytes:
    """Returns an unambiguous byte string of a domain label and parts.

    F(label, p_1 ... p_m) = len(P) ‖ P ‖ len(label) ‖ label ‖ len(p_1) ‖ p_1 ‖ ... with lengths as 8 bytes and integers
    as 4 bytes, both big-endian, P the protocol's name. F is injective: the parts can be read back from it.
    """
    return _PROTOCOL + b"".join(map(_with_length, (label.encode(), *parts)))


def digest(label: str, *parts: bytes | int) -> bytes:
    """Returns SHA-256(F(label, parts))."""
    return hashlib.sha256(framed(label, *parts)).digest()


def derive(secret: bytes, salt: bytes, label: str, *parts: bytes | int) -> bytes:
    """Returns HKDF-SHA256(secret, salt, info = F(label, parts)), 32 bytes [RFC 5869]."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, framed(label, *parts)).derive(secret)


class Agreement:
    """X25519 key agreement between one private key and many public ones [RFC 7748]."""

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()

    def __call__(self, public: bytes) -> bytes:
        """Returns the shared secret.

        Raises:
            ValueError: the public key is a point of small order, so that the result would be publicly known.
        """
        return self._private.exchange(X25519PublicKey.from_public_bytes(public))


def is_weak(public: bytes) -> bool:
    """Returns whether a public key is of small order, so that a shared secret with it would be publicly known."""
    return int.from_bytes(public, "little") % (1 << 255) % _CURVE_PRIME in _SMALL_ORDER


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Encrypts by ChaCha20-Poly1305 [RFC 8439] under a key that is used only once; adds 16 bytes to the plaintext."""
    return ChaCha20Poly1305(key).encrypt(_ONCE_ONLY_NONCE, plaintext, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes | None:
    """Returns the plaintext, or None where it was not encrypted under this key and associated data."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE_ONLY_NONCE, sealed, associated)
    except InvalidTag:
        return None


def _with_length(part: bytes | int) -> bytes:
    data = part.to_bytes(4, "big") if isinstance(part, int) else part
    return len(data).to_bytes(8, "big") + data


_PROTOCOL = _with_length(PROTOCOL.encode())
_CURVE_PRIME = 2**255 - 19
_SMALL_ORDER = {  # the u-coordinates of all points of order 1, 2, 4 and 8 on the curve and its twist
    0,
    1,
    _CURVE_PRIME - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
}
