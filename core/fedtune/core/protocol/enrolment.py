"""Enrolment: the bundle that makes a machine a device of a fleet, and the signed roster of all enrolled devices.

The person who enrols the fleet holds the fleet key, an Ed25519 key. It signs the roster: every device's name and
identity key, with a version that only grows. The owner of a device receives its bundle over a trusted channel. The
bundle pins the certificate authority for the server's certificate, and the fleet key for rosters. Later rosters reach
the device through the server, which need not be trusted with them: a device accepts a roster only with the fleet key's
signature, and never with a version older than the one that it holds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fedtune.core.errors import FedtuneError, InputError, PeerError
from fedtune.core.host.private_files import read_json, write_private
from fedtune.core.secagg.identity import Identity, Roster
from fedtune.core.secagg.primitives import KEY_BYTES, SIGNATURE_BYTES, framed

FORMAT = "fedtune-bundle-1"
MAX_BUNDLE_BYTES = 16 << 20
MAX_ROSTER_VERSION = 1 << 31
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


@dataclass(frozen=True)
class SignedRoster:
    """A roster as the fleet key's holder published it.

    Args:
        version: number that grows with every change; a device never goes back to a smaller one.
        roster: client name -> identity key.
        signature: signature over both.
    """

    version: int
    roster: Roster
    signature: bytes = field(repr=False)

    @classmethod
    def sign(cls, fleet: Identity, version: int, roster: Roster) -> SignedRoster:
        """Signs a roster for publication."""
        return cls(version, roster, fleet.sign(_statement(version, roster)))

    def check(self, fleet_key: bytes) -> None:
        """Checks the signature of the fleet key.

        Raises:
            PeerError: the signature does not fit.
        """
        try:
            Ed25519PublicKey.from_public_bytes(fleet_key).verify(self.signature, _statement(self.version, self.roster))
        except (InvalidSignature, ValueError):
            raise PeerError("the roster is not signed with this fleet's key") from None

    def to_json(self) -> dict[str, Any]:
        """Returns the roster as the JSON object that travels and is kept on disk."""
        keys = {name: self.roster.keys[name].hex() for name in sorted(self.roster.keys)}
        return {"version": self.version, "keys": keys, "signature": self.signature.hex()}

    @classmethod
    def from_json(cls, value: object) -> SignedRoster:
        """Reads what `to_json` wrote; the signature is not checked here.

        Raises:
            PeerError: the value is no signed roster.
        """
        if not isinstance(value, dict) or set(value) != {"version", "keys", "signature"}:
            raise PeerError("a signed roster has version, keys and signature")
        version, keys, signature = value["version"], value["keys"], value["signature"]
        if type(version) is not int or not 0 <= version <= MAX_ROSTER_VERSION:
            raise PeerError("a roster's version is a whole number")
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
            raise PeerError("a roster's keys are names and hexadecimal digits")
        try:
            roster = Roster({name: bytes.fromhex(key) for name, key in keys.items()})
            return cls(version, roster, bytes.fromhex(signature))
        except (TypeError, ValueError, FedtuneError) as error:
            raise PeerError(f"a roster cannot be read: {error}") from None

    def to_bytes(self) -> bytes:
        """Returns the roster as bytes for messages."""
        return json.dumps(self.to_json()).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SignedRoster:
        """Reads what `to_bytes` wrote.

        Raises:
            PeerError: the bytes are no signed roster, or too many.
        """
        if len(data) > MAX_BUNDLE_BYTES:
            raise PeerError(f"a roster has at most {MAX_BUNDLE_BYTES} bytes")
        try:
            return cls.from_json(json.loads(data))
        except (ValueError, RecursionError):
            raise PeerError("a roster cannot be read: it is not JSON") from None


def _statement(version: int, roster: Roster) -> bytes:
    return framed("published roster", version, roster.digest)


@dataclass(frozen=True)
class Bundle:
    """The file that makes a machine a device of a fleet. Its holder can act as that device.

    Args:
        name: name of the device.
        server: HOST:PORT of the server's public interface.
        authority: certificate authority of the server's certificate, PEM.
        node_key: P-256 key with which every request to the server is signed, PEM (PKCS #8).
        identity: Ed25519 key of the device in secure aggregation.
        fleet_key: public half of the key that signs rosters.
        roster: roster at the time of the enrolment.
    """

    name: str
    server: str
    authority: str
    node_key: str = field(repr=False)
    identity: bytes = field(repr=False)
    fleet_key: bytes
    roster: SignedRoster

    def save(self, path: Path) -> None:
        """Writes the bundle to a file that only its owner can read."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "server": self.server,
            "authority": self.authority,
            "node_key": self.node_key,
            "identity": self.identity.hex(),
            "fleet_key": self.fleet_key.hex(),
            "roster": self.roster.to_json(),
        }
        write_private(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Reads and checks a bundle.

        Raises:
            InputError: the file is no bundle, or its parts do not belong together.
        """
        content = read_json(path, "a bundle, which `fedtune server enroll` writes", MAX_BUNDLE_BYTES)
        expected = {"format", "name", "server", "authority", "node_key", "identity", "fleet_key", "roster"}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(
                f"{path}: not a bundle of this version; expected a file that `fedtune server enroll` wrote"
            )
        if set(content) != expected or not all(isinstance(content[key], str) for key in expected - {"roster"}):
            raise InputError(f"{path}: the bundle is incomplete; enrol the device again")
        try:
            bundle = cls(
                check_name(content["name"]),
                check_address(content["server"]),
                content["authority"],
                content["node_key"],
                bytes.fromhex(content["identity"]),
                bytes.fromhex(content["fleet_key"]),
                SignedRoster.from_json(content["roster"]),
            )
            bundle._check()
        except (ValueError, FedtuneError) as error:
            raise InputError(f"{path}: the bundle is damaged ({error}); enrol the device again") from None
        return bundle

    def _check(self) -> None:
        if len(self.identity) != KEY_BYTES or len(self.fleet_key) != KEY_BYTES:
            raise InputError("a key has the wrong length")
        if len(self.roster.signature) != SIGNATURE_BYTES:
            raise InputError("a signature has the wrong length")
        self.roster.check(self.fleet_key)
        if self.roster.roster.keys.get(self.name) != Identity(self.identity).public:
            raise InputError("its identity key is not the roster's")
        load_node_key(self.node_key)
        x509.load_pem_x509_certificate(self.authority.encode())


def load_node_key(pem: str) -> ec.EllipticCurvePrivateKey:
    """Returns the P-256 key of a device.

    Raises:
        InputError: the text is no such key.
    """
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError):
        raise InputError("the node key cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError("the node key is not an elliptic-curve key")
    return key


def make_node_key() -> str:
    """Generates a P-256 key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
