"""How a device joins a fleet: the invitation that it gets, the keys that it makes, and the request that it sends.

    invitation = Invitation.load(path)                  # public: the server's address and authority, the owner's key
    keys = PrivateKeys.generate()                       # they never leave the device
    request = JoinRequest.make("kitchen", keys)         # the server passes it on; request.code is what people compare

The owner approves by the code, 80 bits of a hash over the request: a server that passed on keys of its own would need
2^80 tries for a pair with the same code.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedtune.core.errors import FedtuneError, InputError, PeerError
from fedtune.core.host.private_files import read_bounded, read_json
from fedtune.core.secagg.identity import Identity
from fedtune.core.secagg.primitives import KEY_BYTES, digest, framed

INVITATION = "fedtune-invitation-1"
REQUEST = "fedtune-join-request-1"
JOIN = "/v1/device/join"
MAX_INVITATION_BYTES = 64 << 10
MAX_REQUEST_BYTES = 2 << 10
POINT_BYTES = 33  # of a P-256 key, compressed
_CODE_DIGITS, _GROUP = 16, 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


def check_name(name: str) -> str:
    """Returns a device's name, as it may stand in file names, tables and messages.

    Raises:
        InputError: the name is empty, too long, or has other characters.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:80]!r}: a device's name has 1 to 64 letters, digits, '.', '_' or '-', "
            "and starts with a letter or a digit"
        )
    return name


def check_address(address: str) -> str:
    """Returns an address HOST:PORT, with an IPv6 host in brackets.

    Raises:
        InputError: the text is no such address.
    """
    match = _ADDRESS.fullmatch(address)
    if not match or not 0 < int(match[2]) < 65536:
        raise InputError(f"{address[:200]!r}: expected HOST:PORT, e.g. fleet.example.org:8443 or [2001:db8::1]:8443")
    return address


def fingerprint(fleet_key: bytes) -> str:
    """Returns a fleet key's fingerprint, for people to compare over another channel."""
    return _grouped(digest("fleet key", fleet_key))


def read_public(path: Path) -> bytes:
    """Reads a fleet's public key: 64 hexadecimal digits in a file.

    Raises:
        InputError: the file is missing or holds no key.
    """
    try:
        key = bytes.fromhex(read_bounded(path, "a fleet's public key", 1 << 10).decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(f"{path}: a fleet's public key has 64 hexadecimal digits; expected the owner's fleet.pub")
    return key


@dataclass(frozen=True)
class DeviceKeys:
    """The public keys of a device.

    Args:
        identity: Ed25519, for secure aggregation.
        node: P-256, a compressed point, for requests to the server.
    """

    identity: bytes
    node: bytes

    @property
    def node_pem(self) -> bytes:
        """The request key in PEM format, in exactly the bytes of Flower, which compares bytes."""
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), self.node)
        return point.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def to_json(self) -> dict[str, str]:
        """Returns the keys as hexadecimal digits."""
        return {"identity": self.identity.hex(), "node": self.node.hex()}

    @classmethod
    def from_json(cls, value: Any) -> DeviceKeys:
        """Reads what `to_json` wrote.

        Raises:
            PeerError: they are no keys.
        """
        try:
            if set(value) != {"identity", "node"}:
                raise ValueError
            keys = cls(bytes.fromhex(value["identity"]), bytes.fromhex(value["node"]))
            if len(keys.identity) != KEY_BYTES or len(keys.node) != POINT_BYTES:
                raise ValueError
            _ = keys.node_pem, Ed25519PublicKey.from_public_bytes(keys.identity)
        except (TypeError, ValueError, KeyError):
            raise PeerError("a device's keys are malformed") from None
        return keys


@dataclass(frozen=True)
class PrivateKeys:
    """The private keys of a device, made on it.

    Args:
        identity: Ed25519 key for secure aggregation.
        node: P-256 key that signs requests, PEM (PKCS #8).
    """

    identity: Identity
    node: str = field(repr=False)

    @classmethod
    def generate(cls) -> PrivateKeys:
        """Makes new keys."""
        return cls(Identity.generate(), make_node_key())

    @property
    def public(self) -> DeviceKeys:
        """The public halves."""
        point = load_node_key(self.node).public_key()
        return DeviceKeys(self.identity.public, point.public_bytes(Encoding.X962, PublicFormat.CompressedPoint))


@dataclass(frozen=True)
class JoinRequest:
    """A device's request to join, signed with its identity key."""

    name: str
    keys: DeviceKeys
    signature: bytes = field(repr=False)

    @classmethod
    def make(cls, name: str, keys: PrivateKeys) -> JoinRequest:
        """Makes the request of a device."""
        return cls(check_name(name), keys.public, keys.identity.sign(_statement(name, keys.public)))

    @property
    def code(self) -> str:
        """The code by which the owner approves it."""
        return _grouped(digest("join request", self.name.encode(), self.keys.identity, self.keys.node))

    def to_bytes(self) -> bytes:
        """Returns the request as JSON."""
        content = {"format": REQUEST, "name": self.name, **self.keys.to_json(), "signature": self.signature.hex()}
        return json.dumps(content).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> JoinRequest:
        """Reads and checks what `to_bytes` wrote.

        Raises:
            PeerError: the bytes are no request, or its maker does not hold the keys.
        """
        try:
            if len(data) > MAX_REQUEST_BYTES:
                raise ValueError
            content = json.loads(data)
            if content.pop("format") != REQUEST or set(content) != {"name", "identity", "node", "signature"}:
                raise ValueError
            name = check_name(content.pop("name"))
            signature = bytes.fromhex(content.pop("signature"))
            request = cls(name, DeviceKeys.from_json(content), signature)
            Ed25519PublicKey.from_public_bytes(request.keys.identity).verify(signature, _statement(name, request.keys))
        except (InvalidSignature, ValueError, TypeError, KeyError, AttributeError, RecursionError, FedtuneError):
            raise PeerError("expected a device's request to join, which `fedtune client join` makes") from None
        return request


@dataclass(frozen=True)
class Invitation:
    """The knowledge that makes a machine a device of a fleet; none of it is secret.

    Args:
        server: HOST:PORT of the server's public interface.
        authority: certificate authority of the server's certificate, PEM.
        fleet_key: the owner's first public key.
    """

    server: str
    authority: str
    fleet_key: bytes

    def to_bytes(self) -> bytes:
        """Returns the invitation as JSON."""
        content = {
            "format": INVITATION,
            "server": self.server,
            "authority": self.authority,
            "fleet_key": self.fleet_key.hex(),
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> Invitation:
        """Reads and checks an invitation.

        Raises:
            InputError: the file is no invitation of this version.
        """
        content = read_json(path, "an invitation, which `fedtune server init` writes", MAX_INVITATION_BYTES)
        if isinstance(content, dict) and str(content.get("format", "")).startswith("fedtune-bundle"):
            raise InputError(
                f"{path}: a bundle of an earlier release, whose keys the server has made. Devices now make their own: "
                "set up the server and the fleet again, and join with its invitation.json"
            )
        texts = ("server", "authority", "fleet_key")
        if not isinstance(content, dict) or content.get("format") != INVITATION or set(content) != {"format", *texts}:
            raise InputError(f"{path}: no invitation of this version; expected one that `fedtune server init` wrote")
        try:
            found = cls(check_address(content["server"]), content["authority"], bytes.fromhex(content["fleet_key"]))
            x509.load_pem_x509_certificate(found.authority.encode())
            Ed25519PublicKey.from_public_bytes(found.fleet_key)
        except (ValueError, TypeError, AttributeError, FedtuneError) as error:
            raise InputError(f"{path}: the invitation is damaged ({error}); get it again") from None
        return found


def load_node_key(pem: str) -> ec.EllipticCurvePrivateKey:
    """Returns the P-256 key of a device.

    Raises:
        InputError: the text is no such key.
    """
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError("the node key cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError("the node key is not an elliptic-curve key")
    return key


def make_node_key() -> str:
    """Generates a P-256 key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _statement(name: str, keys: DeviceKeys) -> bytes:
    return framed("device joins", name.encode(), keys.identity, keys.node)


def _grouped(hashed: bytes) -> str:
    """Returns 80 bits of a hash as 16 letters and digits in groups of four."""
    text = base64.b32encode(hashed)[:_CODE_DIGITS].decode()
    return "-".join(text[start : start + _GROUP] for start in range(0, _CODE_DIGITS, _GROUP))
