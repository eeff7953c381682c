"""A lying server and a device that pulls: what the owner has not released, or released before, is not installed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtune.client.inference.model_line import PatientLine
from fedtune.client.inference.model_pull import Pulled, pull
from fedtune.client.inference.model_versions import Versions
from fedtune.client.live.device_home import ClientHome
from fedtune.core.errors import InputError, PeerError
from fedtune.core.manifest.fleet_log import Change
from fedtune.core.manifest.joining import Invitation
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.messages import PROTOCOL_VERSION
from fedtune.core.protocol.model_manifest import FileEntry, Manifest
from fedtune.core.protocol.model_requests import ModelDescription, ReadModel
from fedtune.core.secagg.identity import Identity
from fedtune.server.fleet.owner_home import OwnerHome

OWNER = Identity(b"\x01" * 32)
ENTRY = FileEntry(hashlib.sha256(b"x").hexdigest(), 1)
MODEL = json.dumps(Manifest("model", "first", "int4", {}, {"a": ENTRY}).to_json()).encode()
DIGEST = hashlib.sha256(MODEL).hexdigest()


def statement(
    name: str = "first", number: int = 1, digest: str = DIGEST, key: Identity = OWNER, seconds: float = 86_400.0
) -> bytes:
    """Returns a release of an int4."""
    return ModelRelease.sign(key, number, name, {"int4": digest}, time.time() + seconds).data


@dataclass
class Server:
    """A server that offers the model under any release and log, and counts what it is asked for."""

    released: bytes
    log: bytes = b""
    asked: int = 0

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        return ModelDescription(PROTOCOL_VERSION, "int4", MODEL, self.released, self.log)

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        self.asked += 1
        yield b"x"


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "models")


def installed(server: Server, versions: Versions) -> Pulled:
    """Pulls to a device that knows the owner's key already."""
    return pull(PatientLine(server, ()), versions, lambda log: OWNER.public)


@pytest.mark.parametrize(
    ("released", "words"),
    [
        (b"", "a model release cannot be read"),
        (statement(key=Identity(b"\x02" * 32)), "the model release is not signed with this fleet's key"),
        (statement().replace(b'"number":1', b'"number":2'), "not signed with this fleet's key"),
        (statement(digest="0" * 64), "the server's int4 is not the one that the fleet's owner has released for first"),
        (statement(seconds=-1.0), "release 1 of first has expired"),
    ],
)
def test_a_model_that_the_owner_has_not_released_is_not_even_asked_for(
    versions: Versions, released: bytes, words: str
) -> None:
    server = Server(released)
    with pytest.raises(PeerError, match=words):
        installed(server, versions)
    assert (versions.current, versions.release, server.asked) == (None, None, 0)


def test_no_release_comes_back_after_a_newer_one_was_installed(versions: Versions) -> None:
    assert installed(Server(statement("second", 2)), versions).release.number == 2
    again = Versions(versions.folder)  # after a restart
    for released in (statement("first", 1), statement("other", 2)):
        with pytest.raises(PeerError, match=r"and this device has installed release 2, second; the fleet's owner may"):
            installed(Server(released), again)
    assert again.current is not None
    assert again.current.name.startswith("second-int4-")
    # The owner returns the fleet to the older model under a new number.
    assert installed(Server(statement("first", 3)), again).path.name.startswith("first-int4-")


def test_going_back_on_the_device_lets_no_older_release_in(versions: Versions) -> None:
    first, second = Server(statement("first", 1)), Server(statement("second", 2))
    installed(first, versions)
    installed(second, versions)
    assert versions.roll_back().name.startswith("first-")
    with pytest.raises(PeerError, match="this device has installed release 2"):
        installed(first, versions)
    assert installed(second, versions).path.name.startswith("second-")


def test_a_crash_while_versions_change_forgets_no_release(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Path, target: Path | str, target_is_directory: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", dies)
        with pytest.raises(KeyboardInterrupt):
            installed(Server(statement("second", 2)), versions)
    with pytest.raises(PeerError, match="this device has installed release 2"):
        installed(Server(statement("first", 1)), versions)


def test_a_damaged_release_on_the_device_is_an_error_and_not_a_device_without_one(versions: Versions) -> None:
    installed(Server(statement(number=2)), versions)
    (versions.folder / "release.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"release.json: .*leave the fleet and join again"):
        installed(Server(statement(number=1)), versions)


class Fleet:
    """An owner, a device that has joined, and a server between them that shows any log."""

    def __init__(self, folder: Path) -> None:
        self.owner = OwnerHome.create(folder / "owner")
        (folder / "mine.jsonl").write_text('{"text": "a"}\n')
        invitation = Invitation("localhost:8443", "", self.owner.first_key)
        self.device = ClientHome.join(folder / "device", invitation, "ada", folder / "mine.jsonl")
        assert self.device.request is not None
        self.owner.approve([self.device.request])

    def release(self) -> bytes:
        return self.owner.release("first", {"int4": DIGEST}).data

    def pull(self, released: bytes, log: bytes | None = None) -> int:
        """Returns the number of the release that the device has installed."""
        line = PatientLine(Server(released, self.owner.log if log is None else log), ())
        return pull(line, self.device.models, self.device.owner_key_after).release.number


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_device_that_only_pulls_follows_the_owner_s_log_by_itself(fleet: Fleet) -> None:
    assert fleet.device.request is not None  # it was never registered for a job
    assert fleet.pull(fleet.release()) == 1
    assert fleet.device.request is None
    assert fleet.device.fleet == fleet.owner.fleet


def test_a_key_that_the_owner_has_replaced_releases_nothing(fleet: Fleet) -> None:
    stolen, log = fleet.owner.key, fleet.owner.log
    assert fleet.pull(fleet.release()) == 1
    fleet.owner.rotate()
    forged = statement(number=7, key=stolen)
    with pytest.raises(PeerError, match="the model release is not signed with this fleet's key"):
        fleet.pull(forged)
    # The device has seen the log with the new key, so a server cannot show it the one before.
    with pytest.raises(PeerError, match="older than the one that this side holds"):
        fleet.pull(forged, log)
    assert fleet.pull(fleet.release()) == 2


def test_a_log_that_has_expired_or_lacks_the_device_admits_no_model(fleet: Fleet) -> None:
    released = fleet.release()
    fleet.owner.change(Change(), days=-1)
    with pytest.raises(PeerError, match="the fleet's log has expired"):
        fleet.pull(released)
    fleet.owner.revoke(["ada"])
    with pytest.raises(PeerError, match="does not list this device"):
        fleet.pull(released)
    assert fleet.device.models.current is None
