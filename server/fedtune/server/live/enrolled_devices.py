"""The enrolled devices: public keys by name, and the signed roster that devices pin.

The private keys are written to the device's bundle only.
"""

from __future__ import annotations

import fcntl
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.core.errors import FedtuneError, InputError
from fedtune.core.host.private_files import read_json, write_private
from fedtune.core.protocol.enrolment import Bundle, SignedRoster, check_name, load_node_key, make_node_key
from fedtune.core.secagg.identity import Identity, Roster
from fedtune.server.live.server_home import ServerHome

MAX_DEVICES = 100_000


@dataclass(frozen=True)
class Devices:
    """The enrolled devices.

    Args:
        node_keys: name -> public key of the device's requests, in PEM format.
        roster: name -> public key for secure aggregation; signed.
    """

    node_keys: dict[str, bytes]
    roster: SignedRoster

    @classmethod
    def load(cls, home: ServerHome) -> Devices:
        """Reads devices.json; without that file there are no devices.

        Raises:
            InputError: the file is damaged.
        """
        path = _path(home)
        if not path.exists():
            return cls({}, SignedRoster.sign(home.fleet_key, 0, Roster({})))
        content = read_json(path, "the list of devices")
        try:
            roster = SignedRoster.from_json(content["roster"])
            roster.check(home.fleet_key.public)
            keys = {name: b64decode(key, validate=True) for name, key in content["node_keys"].items()}
        except (TypeError, KeyError, AttributeError, ValueError, FedtuneError) as error:
            raise InputError(f"{path}: the list of devices is damaged: {error}") from None
        if set(keys) != set(roster.roster.keys):
            raise InputError(f"{path}: the list of devices is damaged: it disagrees with the roster")
        return cls(keys, roster)


class EnrolledKeys:
    """The public keys of the enrolled devices; a revoked device's next request is refused."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._shown: frozenset[bytes] = frozenset()
        self._seen = -1

    def __contains__(self, shown: object) -> bool:
        """Returns whether a base64 key from a request belongs to an enrolled device."""
        seen = changed(self._home)
        if seen != self._seen:
            self._shown, self._seen = frozenset(map(b64encode, Devices.load(self._home).node_keys.values())), seen
        return shown in self._shown


def enroll(home: ServerHome, name: str, out: Path) -> Bundle:
    """Enrols a device and writes its bundle, the only place where its private keys are.

    Raises:
        InputError: the name is taken or invalid, or the bundle's file exists.
    """
    check_name(name)
    with _changing(home) as devices:
        if name in devices.node_keys:
            raise InputError(f"{name}: enrolled already; to enrol it again, first: fedtune server revoke {name}")
        if out.exists():
            raise InputError(f"{out}: exists already; choose another --out")
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder")
        if len(devices.node_keys) >= MAX_DEVICES:
            raise InputError(f"{home.path}: {MAX_DEVICES} devices are enrolled; that is the most a server takes")
        identity, node_key = os.urandom(32), make_node_key()
        roster = _grown(home, devices, {**devices.roster.roster.keys, name: Identity(identity).public})
        bundle = Bundle(
            name, home.config.address, home.authority.decode(), node_key, identity, home.fleet_key.public, roster
        )
        bundle.save(out)  # first: a bundle without an enrolment does less harm than the reverse
        _save(home, Devices({**devices.node_keys, name: _public(node_key)}, roster))
    return bundle


def revoke(home: ServerHome, name: str) -> None:
    """Revokes a device; a running server cuts it off within seconds.

    Raises:
        InputError: there is no such device.
    """
    with _changing(home) as devices:
        if name not in devices.node_keys:
            known = ", ".join(sorted(devices.node_keys)[:20]) or "none"
            raise InputError(f"{name[:80]}: no such device; enrolled: {known}")
        keys = {other: key for other, key in devices.roster.roster.keys.items() if other != name}
        nodes = {other: key for other, key in devices.node_keys.items() if other != name}
        _save(home, Devices(nodes, _grown(home, devices, keys)))


def changed(home: ServerHome) -> int:
    """Returns a number that differs after every change to the devices."""
    try:
        return _path(home).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _path(home: ServerHome) -> Path:
    return home.path / "devices.json"


def _public(node_key: str) -> bytes:
    # Exactly the bytes into which Flower serialises a public key, since Flower compares the bytes.
    return load_node_key(node_key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _grown(home: ServerHome, devices: Devices, keys: dict[str, bytes]) -> SignedRoster:
    return SignedRoster.sign(home.fleet_key, devices.roster.version + 1, Roster(keys))


def _save(home: ServerHome, devices: Devices) -> None:
    keys = {name: b64encode(key).decode() for name, key in sorted(devices.node_keys.items())}
    content = {"node_keys": keys, "roster": devices.roster.to_json()}
    write_private(_path(home), json.dumps(content, indent=1) + "\n")


@contextmanager
def _changing(home: ServerHome) -> Iterator[Devices]:
    """Locks the list of devices, so that concurrent changes happen one after the other."""
    lock = os.open(home.path / "devices.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Devices.load(home)
    finally:
        os.close(lock)
