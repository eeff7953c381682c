"""The fleet log: every change that a fleet's owner has made to it, numbered, chained and signed; none is ever removed.

    entry 1   ->   entry 2   ->   ...        one line each: devices approved and revoked, when it expires, the next key

    fleet = replay(log, first_key)           # its devices, the key in force, the expiry
    fleet = extended(held, log, first_key)   # the same, where `held` is an earlier state of the log

The log reaches devices through the server, which need not be trusted with it. It cannot write an entry, since each is
signed with the owner's key; it cannot take one back or change one, since a device accepts only a log that begins with
the very bytes it holds; and it cannot hold back new ones for long, since the last entry expires (The Update Framework's
rollback and freeze attacks).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.manifest.joining import DeviceKeys, check_name
from fedtune.core.manifest.signed import Signed
from fedtune.core.secagg.identity import Identity, Roster

KIND = "fleet entry"
MAX_LOG_BYTES = 16 << 20
MAX_ENTRY_BYTES = 4 << 20
MAX_DEVICES = 100_000
DAYS = 90.0  # for which an entry is valid unless its signer says otherwise
_FIELDS = {"number", "previous", "expires", "approved", "revoked", "next_key"}


@dataclass(frozen=True)
class Fleet:
    """A fleet after the entries of its log.

    Args:
        key: public key that signs the next entry, and manifests.
        number: number of the last entry; 0 before the first.
        digest: SHA-256 of the last entry's line, in hexadecimal digits.
        expires: seconds since 1970 after which the log counts as held back.
        devices: name -> public keys.
    """

    key: bytes
    number: int = 0
    digest: str = ""
    expires: float = 0.0
    devices: Mapping[str, DeviceKeys] = field(default_factory=dict, repr=False)

    @property
    def roster(self) -> Roster:
        """The devices' keys for secure aggregation."""
        return Roster({name: keys.identity for name, keys in self.devices.items()})

    def check_fresh(self, now: float) -> None:
        """Checks that the log's last entry is still valid.

        Raises:
            PeerError: it has expired.
        """
        if not now < self.expires:
            raise PeerError(
                "the fleet's log has expired: the server holds newer entries back, or the owner has to renew it with: "
                "fedtune fleet renew"
            )


@dataclass(frozen=True)
class Change:
    """One change of a fleet.

    Args:
        approved: devices that join: name -> public keys.
        revoked: names of devices that leave.
        next_key: public key that signs from the next entry on; empty where it stays the same.
    """

    approved: Mapping[str, DeviceKeys] = field(default_factory=dict)
    revoked: tuple[str, ...] = ()
    next_key: bytes = b""


def append(log: bytes, fleet: Fleet, key: Identity, change: Change, expires: float) -> tuple[bytes, Fleet]:
    """Returns the log with one more entry, and the fleet after it.

    Raises:
        PeerError: the change contradicts the fleet: a name is taken or unknown, or a key is in use.
    """
    content = {
        "number": fleet.number + 1,
        "previous": fleet.digest,
        "expires": expires,
        "approved": {name: keys.to_json() for name, keys in change.approved.items()},
        "revoked": list(change.revoked),
        "next_key": change.next_key.hex(),
    }
    line = Signed.sign(key, KIND, content).to_bytes()
    after = _after(fleet, line)
    if len(log) + len(line) > MAX_LOG_BYTES:
        raise PeerError(f"the fleet's log has {len(log)} bytes; at most {MAX_LOG_BYTES} are accepted")
    return log + line, after


def replay(log: bytes, first_key: bytes) -> Fleet:
    """Returns the fleet after all entries of a log.

    Args:
        first_key: the owner's first public key.

    Raises:
        PeerError: an entry is not signed by the key in force, out of order, or contradicts those before it.
    """
    if len(log) > MAX_LOG_BYTES:
        raise PeerError(f"a fleet's log has at most {MAX_LOG_BYTES} bytes, got {len(log)}")
    if log and not log.endswith(b"\n"):
        raise PeerError("the fleet's log is cut off")
    fleet = Fleet(first_key)
    for line in log.splitlines(keepends=True):
        fleet = _after(fleet, line)
    return fleet


def extended(held: bytes, log: bytes, first_key: bytes) -> Fleet:
    """Returns the fleet after a log that continues the one that is held.

    Raises:
        PeerError: as `replay`; or the log is older than the held one, or another.
    """
    if held.startswith(log) and held != log:
        raise PeerError("the fleet's log is older than the one that this side holds")
    if not log.startswith(held):
        raise PeerError("the fleet's log is not the one that this side holds: an entry was changed or taken back")
    return replay(log, first_key)


def _after(fleet: Fleet, line: bytes) -> Fleet:
    """Returns the fleet after one more entry."""
    content = Signed.read(line, KIND, MAX_ENTRY_BYTES).checked(fleet.key)
    if set(content) != _FIELDS:
        raise PeerError(f"a {KIND} has {', '.join(sorted(_FIELDS))}")
    if (content["number"], content["previous"]) != (fleet.number + 1, fleet.digest):
        raise PeerError(f"entry {content['number']!r} of the fleet's log does not follow entry {fleet.number}")
    try:
        change, expires = _change(content), float(content["expires"])
        devices = dict(fleet.devices)
        for name in change.revoked:
            if name not in devices:
                raise PeerError(f"{name[:80]}: no such device; known: {', '.join(sorted(devices)[:20]) or 'none'}")
            del devices[name]
        for name, keys in change.approved.items():
            if check_name(name) in devices:
                raise PeerError(f"{name}: there is a device of this name; revoke it first")
            devices[name] = keys
        if len(devices) > MAX_DEVICES:
            raise PeerError(f"a fleet has at most {MAX_DEVICES} devices")
        if len({keys.node for keys in devices.values()}) < len(devices):
            raise PeerError("two devices have the same key")
        after = Fleet(
            change.next_key or fleet.key, fleet.number + 1, hashlib.sha256(line).hexdigest(), expires, devices
        )
        _ = after.roster  # refuses one identity key of two devices
    except (TypeError, ValueError, OverflowError, AttributeError, FedtuneError) as error:
        raise PeerError(f"entry {fleet.number + 1} of the fleet's log: {error}") from None
    return after


def _change(content: dict[str, Any]) -> Change:
    approved = {str(name): DeviceKeys.from_json(value) for name, value in content["approved"].items()}
    key = bytes.fromhex(content["next_key"])
    if len(key) not in (0, 32):
        raise PeerError("a fleet's key has 32 bytes")
    return Change(approved, tuple(map(str, content["revoked"])), key)
