"""A machine joins a running fleet: it makes its keys, the server passes its request on, the owner approves its code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from endpoint import Endpoint, listening
from live_helpers import Fleet, MakeFleet, eventually
from owner import approve, owner_of

from fedtune.client.live.device_home import ClientHome
from fedtune.core.errors import InputError
from fedtune.core.manifest.joining import JOIN, JoinRequest, PrivateKeys
from fedtune.server.fleet.owner_home import OwnerHome
from fedtune.server.live.enrolled_devices import MAX_REQUESTS, Devices, publish, receive, waiting


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    yield from listening(tmp_path)


def joined_by_command(fleet: Fleet, name: str) -> subprocess.CompletedProcess[str]:
    arguments = (
        *("client", "join", fleet.home.path / "invitation.json", "--name", name, "--no-try"),
        *("--data", fleet.folder / "data" / "clients" / f"{name}.jsonl", "--home", fleet.client_home(name)),
    )
    command = [sys.executable, "-c", "from fedtune.server.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_devices_that_join_while_the_server_runs_train_once_the_owner_has_approved_them(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    fleet.start_server()
    first, *others = fleet.names
    before = joined_by_command(fleet, first)  # the server may not listen yet; the device hands its request in again
    assert before.returncode == 0, before.stderr
    request = ClientHome(fleet.client_home(first)).request
    assert request is not None
    assert f"this device's code: {request.code}" in before.stdout
    fleet.start_device(first)
    eventually(lambda: [each.code for each in waiting(fleet.home)] == [request.code], complaint=fleet.logs)
    for name in others:
        said = joined_by_command(fleet, name)
        assert "the server has the request; the fleet's owner approves it: fedtune fleet approve" in said.stdout
        fleet.start_device(name)
    assert {each.name for each in waiting(fleet.home)} == set(fleet.names)
    assert fleet.status()["fleet"]["wait_for_approval"][request.code] == first
    assert f"not approved yet; code {request.code}" in fleet.devices[first].text
    approve(fleet.home, *waiting(fleet.home))
    assert waiting(fleet.home) == []
    run = fleet.submit("federation.rounds=1")
    assert fleet.finished(run)[0]["survivors"] == fleet.names
    assert ClientHome(fleet.client_home(first)).request is None
    assert "3 devices; joined: 000, 001, 002" in fleet.devices[first].text


def private_keys(fleet: Fleet) -> list[bytes]:
    """Returns every private key of the devices and of the owner: as its file has it, and as bytes."""
    found = [path.read_bytes().strip() for name in fleet.names for path in fleet.client_home(name).glob("*.key")]
    found.append((owner_of(fleet.home).path / "fleet.key").read_bytes().strip())
    assert len(found) == 2 * len(fleet.names) + 1
    return found + [bytes.fromhex(key.decode()) for key in found if not key.startswith(b"-")]


def test_the_private_keys_of_devices_and_owner_are_nowhere_in_the_server_s_folder_nor_given_to_its_processes(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(3)
    fleet.join()
    server = fleet.start_server()
    fleet.start_devices()
    fleet.finished(fleet.submit("federation.rounds=1"))
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(processes) > 1  # the listening one
    given = [Path(f"/proc/{process.pid}/{file}") for process in processes for file in ("environ", "cmdline")]
    files = [path for path in fleet.home.path.rglob("*") if path.is_file()]
    assert {"fleet.jsonl", "server.key", "link.db"} <= {path.name for path in files}
    for path in (*given, *files):
        content = path.read_bytes()
        assert not [key for key in private_keys(fleet) if key in content], path


def test_the_server_takes_only_a_log_that_continues_its_own(endpoint: Endpoint) -> None:
    held = Devices.load(endpoint.home).log
    shorter = b"".join(held.splitlines(keepends=True)[:-1])
    foreign = OwnerHome.create(endpoint.home.path.parent / "another owner").log
    for lie, complaint in ((shorter, "older than the one"), (foreign, "changed or taken back"), (held[:-9], "older")):
        with pytest.raises(InputError, match=f"the log is not taken: .*{complaint}"):
            publish(endpoint.home, lie)
    assert Devices.load(endpoint.home).log == held


def test_strange_bytes_at_the_one_open_door_change_nothing(endpoint: Endpoint) -> None:
    honest = JoinRequest.make("new", PrivateKeys.generate())
    other = JoinRequest("new", PrivateKeys.generate().public, honest.signature)
    for body, status in ((b"", 400), (b"{}", 400), (b"x" * 2000, 400), (b"x" * 5000, 413), (other.to_bytes(), 400)):
        assert endpoint.post(JOIN, body=body).status_code == status
    taken = JoinRequest.make("ada", PrivateKeys.generate())
    assert endpoint.post(JOIN, body=taken.to_bytes()).status_code == 409
    assert waiting(endpoint.home) == []
    log = Devices.load(endpoint.home).log
    assert endpoint.post(JOIN, body=honest.to_bytes()).status_code == 200
    assert endpoint.post(JOIN, body=honest.to_bytes()).status_code == 200  # again, after a lost answer
    assert [request.code for request in waiting(endpoint.home)] == [honest.code]
    assert Devices.load(endpoint.home).log == log


def test_the_requests_that_wait_are_bounded(endpoint: Endpoint) -> None:
    folder = endpoint.home.path / "requests"
    folder.mkdir(exist_ok=True)
    for number in range(MAX_REQUESTS):
        (folder / f"{number}.json").touch()
    request = JoinRequest.make("late", PrivateKeys.generate())
    assert endpoint.post(JOIN, body=request.to_bytes()).status_code == 409
    (folder / "0.json").unlink()
    receive(endpoint.home, request)
    assert [each.name for each in waiting(endpoint.home)] == ["late"]
