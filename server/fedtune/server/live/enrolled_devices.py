"""The server's copy of the fleet's log: which devices there are, and the requests of those that want to join.

The server cannot change the log, since the fleet's owner signs every entry. It takes entries that continue the log that
it holds, and passes the log on to devices, which check it themselves.

    fleet.pub           the owner's first public key, in hexadecimal digits
    fleet.jsonl         the fleet's log
    requests/CODE.json  devices that wait for the owner's approval
"""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune.core.errors import InputError, PeerError
from fedtune.core.host.private_files import private_folder, read_bounded, taking_turns, write_private
from fedtune.core.manifest.fleet_log import MAX_LOG_BYTES, Fleet, extended, replay
from fedtune.core.manifest.joining import MAX_REQUEST_BYTES, JoinRequest
from fedtune.server.live.server_home import ServerHome

MAX_REQUESTS = 1000
_LOG, _REQUESTS = "fleet.jsonl", "requests"


@dataclass(frozen=True)
class Devices:
    """The devices of the fleet.

    Args:
        fleet: the fleet after the log's last entry.
        log: the log.
    """

    fleet: Fleet
    log: bytes

    @classmethod
    def load(cls, home: ServerHome) -> Devices:
        """Reads the log; without one there are no devices.

        Raises:
            InputError: the log is damaged.
        """
        path = home.path / _LOG
        log = read_bounded(path, "the fleet's log", MAX_LOG_BYTES) if path.exists() else b""
        try:
            return cls(replay(log, home.fleet_key), log)
        except PeerError as error:
            raise InputError(f"{path}: {error}") from None

    @property
    def node_keys(self) -> dict[str, bytes]:
        """Name -> public key of the device's requests, in PEM format."""
        return {name: keys.node_pem for name, keys in self.fleet.devices.items()}


class EnrolledKeys:
    """The public keys of the fleet's devices; a revoked device's next request is refused."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._shown: frozenset[bytes] = frozenset()
        self._seen = -1

    def __contains__(self, shown: object) -> bool:
        """Returns whether a base64 key from a request belongs to a device of the fleet."""
        seen = changed(self._home)
        if seen != self._seen:
            self._shown, self._seen = frozenset(map(b64encode, Devices.load(self._home).node_keys.values())), seen
        return shown in self._shown


def publish(home: ServerHome, log: bytes) -> Fleet:
    """Takes a log that continues the server's own; a running server notices within seconds.

    Raises:
        InputError: it does not, or its last entries are not signed by the fleet's owner.
    """
    with taking_turns(home.path / "devices.lock"):
        try:
            fleet = extended(Devices.load(home).log, log, home.fleet_key)
        except PeerError as error:
            raise InputError(f"{home.path}: the log is not taken: {error}") from None
        write_private(home.path / _LOG, log)
        for request in waiting(home):
            if request.name in fleet.devices:
                _path(home, request).unlink(missing_ok=True)
    return fleet


def receive(home: ServerHome, request: JoinRequest) -> None:
    """Keeps a device's request for the owner.

    Raises:
        InputError: there is a device of that name, or too many requests wait.
    """
    if request.name in Devices.load(home).fleet.devices:
        raise InputError(f"there is a device named {request.name} in this fleet")
    folder = private_folder(home.path / _REQUESTS)
    path = _path(home, request)
    if not path.exists() and sum(1 for _ in folder.iterdir()) >= MAX_REQUESTS:
        raise InputError(f"{MAX_REQUESTS} requests wait for the fleet's owner; no more are taken")
    write_private(path, request.to_bytes())


def waiting(home: ServerHome) -> list[JoinRequest]:
    """Returns the requests that wait for approval, by name; files that are none are left out."""
    found = []
    folder = home.path / _REQUESTS
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        with suppress(InputError, PeerError):
            found.append(JoinRequest.from_bytes(read_bounded(path, "a request", MAX_REQUEST_BYTES)))
    return sorted(found, key=lambda request: request.name)


def changed(home: ServerHome) -> int:
    """Returns a number that differs after every change to the devices."""
    try:
        return (home.path / _LOG).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _path(home: ServerHome, request: JoinRequest) -> Path:
    return home.path / _REQUESTS / f"{request.code}.json"
