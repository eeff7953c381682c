"""The fleet's owner in tests: approves devices whose keys the test makes, and publishes the log to the server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune.core.manifest.joining import Invitation, JoinRequest, PrivateKeys
from fedtune.server.fleet.owner_home import OwnerHome
from fedtune.server.live.enrolled_devices import publish
from fedtune.server.live.server_home import INVITATION, ServerConfig, ServerHome


@dataclass(frozen=True)
class Enrolled:
    """A device of the fleet that exists only in a test.

    Args:
        node_key: private key for its requests, PEM.
        fleet_key: first public key of the fleet's owner, which it pins.
    """

    name: str
    server: str
    authority: str
    node_key: str
    fleet_key: bytes


def make_server(path: Path, config: ServerConfig, hosts: list[str] | None = None) -> ServerHome:
    """Makes a server, and beside it the folder of a fleet's owner."""
    return ServerHome.create(path, config, hosts or [], OwnerHome.create(path.parent / "owner").first_key)


def owner_of(home: ServerHome) -> OwnerHome:
    """Returns the owner of a server that `make_server` made."""
    return OwnerHome(home.path.parent / "owner")


def enroll(home: ServerHome, name: str) -> Enrolled:
    """Makes a device's keys, and has the owner approve them."""
    keys, owner = PrivateKeys.generate(), owner_of(home)
    owner.approve([JoinRequest.make(name, keys)])
    publish(home, owner.log)
    return Enrolled(name, home.config.address, home.authority.decode(), keys.node, owner.first_key)


def approve(home: ServerHome, *requests: JoinRequest) -> None:
    """Has the owner approve requests."""
    owner = owner_of(home)
    owner.approve(requests)
    publish(home, owner.log)


def revoke(home: ServerHome, name: str) -> None:
    """Has the owner revoke a device."""
    owner = owner_of(home)
    owner.revoke([name])
    publish(home, owner.log)


def invitation(home: ServerHome) -> Invitation:
    """Returns the server's invitation."""
    return Invitation.load(home.path / INVITATION)
