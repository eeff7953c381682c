"""What fedtune relies on in Flower's internals; an upgrade of flwr that changes any of it fails here first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from endpoint import Endpoint, listening
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedtune.core.protocol.bundles import BRING, COLLECT, MAX_BUNDLE_BYTES, SEND, TAKE
from fedtune.flower import run_grid as grid_module
from fedtune.flower.calls import LinkLostError
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.fleet_link import (
    FleetLink,
    RunOverError,
    UnknownDeviceError,
    UnreachableError,
    error_reply,
    identify,
    interrupted,
)
from fedtune.flower.run_grid import RunGrid
from fedtune.server.live.sockets import Listener


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from listening(tmp_path_factory.mktemp("door"))


@pytest.fixture
def device(endpoint: Endpoint) -> Iterator[FleetLink]:
    link = endpoint.newcomer()
    link.activate()
    yield link
    link.deactivate(link.node_id)
    link.close()


@pytest.fixture
def grid(endpoint: Endpoint) -> Iterator[RunGrid]:
    with endpoint.link.open_run(60.0) as grid:
        yield grid


def take(device: FleetLink) -> Message:
    """The message that waits for a device, in whose name this process then speaks."""
    task = device.pull()
    assert task is not None
    message = device.fetch(task)
    identify(message, device.node_id)
    return message


def ask(grid: RunGrid, device: FleetLink, payload: bytes = b"question") -> str:
    # Flower keeps one identity a process, and this one plays both sides.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, grid.run.run_id, 1
    (message_id,) = grid.push_messages([Message(seal(payload), device.node_id, "query.anything", ttl=600)])
    assert message_id
    return message_id


@pytest.mark.parametrize("size", [0, 1, 1000, 900_000])
def test_payloads_cross_both_ways_bit_for_bit(grid: RunGrid, device: FleetLink, size: int) -> None:
    payload = np.random.default_rng(size).bytes(size)
    message_id = ask(grid, device, payload)
    message = take(device)
    assert (message.metadata.message_type, unseal(message)) == ("query.anything", payload)
    assert grid.pull_messages([message_id]) == []
    device.answer(Message(seal(payload[::-1]), reply_to=message), 1.0)
    (reply,) = grid.pull_messages([message_id])
    assert (unseal(reply), reply.metadata.src_node_id) == (payload[::-1], device.node_id)
    assert reply.metadata.reply_to_message_id == message_id
    assert grid.pull_messages([message_id]) == []


def test_small_messages_take_two_requests_and_large_ones_go_piece_by_piece(
    grid: RunGrid, device: FleetLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    send = httpx.Client.send

    def noted(client: httpx.Client, request: httpx.Request, **settings: Any) -> httpx.Response:
        calls.append(request.url.path)
        return send(client, request, **settings)

    monkeypatch.setattr(httpx.Client, "send", noted)
    for size in (20_000, 2 * MAX_BUNDLE_BYTES):
        message_id = ask(grid, device, bytes(size))
        device.answer(Message(seal(bytes(size)), reply_to=take(device)), 0.0)
        (reply,) = grid.pull_messages([message_id])
        assert len(unseal(reply)) == size
        if size < MAX_BUNDLE_BYTES:
            assert calls == [SEND, TAKE, BRING, COLLECT]
    assert {"/v1/fleet/pull-object", "/v1/fleet/push-object"} < set(calls)


def test_messages_too_large_for_one_request_reach_everyone(
    grid: RunGrid, device: FleetLink, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "MAX_BATCH_BYTES", 50_000)
    other = endpoint.newcomer()
    other.activate()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, grid.run.run_id, 1
    devices = [device, device, other, other]
    payloads = [np.random.default_rng(size).bytes(size) for size in (30_000, 30_000, 70_000, 10)]
    messages = [
        Message(seal(payload), link.node_id, "query.anything", ttl=600)
        for link, payload in zip(devices, payloads, strict=True)
    ]
    assert all(grid.push_messages(messages))
    assert sorted(unseal(take(link)) for link in devices) == sorted(payloads)
    assert device.pull() is None
    assert other.pull() is None
    other.deactivate(other.node_id)


def test_an_error_reply_comes_from_the_device_that_was_asked(grid: RunGrid, device: FleetLink) -> None:
    message_id = ask(grid, device)
    device.answer(error_reply(take(device), "no memory left"), 0.0)
    (reply,) = grid.pull_messages([message_id])
    assert (reply.error.reason, reply.metadata.src_node_id) == ("no memory left", device.node_id)


def test_a_device_that_forgot_everything_can_still_say_so(grid: RunGrid, device: FleetLink) -> None:
    message_id = ask(grid, device)
    task = device.pull()
    assert task is not None
    device.fetch(task)
    request = interrupted(task.proto)
    identify(request, request.metadata.dst_node_id)
    device.answer(error_reply(request, "interrupted"), 0.0)
    (reply,) = grid.pull_messages([message_id])
    assert reply.error.reason == "interrupted"


def test_a_reply_may_be_brought_twice(grid: RunGrid, device: FleetLink) -> None:
    message_id = ask(grid, device)
    reply = Message(seal(b"once"), reply_to=take(device))
    device.answer(reply, 0.0)
    device.answer(reply, 0.0)
    assert [unseal(found) for found in grid.pull_messages([message_id])] == [b"once"]


@pytest.mark.parametrize("ahead", [172_800.0, -172_800.0])
def test_a_device_whose_clock_is_days_off_is_heard(
    grid: RunGrid, device: FleetLink, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    message_id = ask(grid, device)
    reply = Message(seal(b"late or early"), reply_to=take(device))
    reply.metadata.created_at += ahead  # as Flower writes it there: both sum up to the question's end
    reply.metadata.ttl -= ahead
    monkeypatch.setattr(FleetLink, "clock_error", ahead)
    device.answer(reply, 0.0)
    (heard,) = grid.pull_messages([message_id])
    assert unseal(heard) == b"late or early"


def test_a_device_that_goes_is_reported_at_once(grid: RunGrid, endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    device.activate()
    message_id = ask(grid, device)
    device.deactivate(device.node_id)
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.metadata.src_node_id == device.node_id


def test_a_device_cannot_answer_for_another(grid: RunGrid, device: FleetLink, endpoint: Endpoint) -> None:
    other = endpoint.newcomer()
    other.activate()
    message_id = ask(grid, device)
    message = take(device)
    identify(message, other.node_id)
    with pytest.raises(UnreachableError, match="400"):
        other.answer(Message(seal(b"forged"), reply_to=message), 0.0)
    assert grid.pull_messages([message_id]) == []
    identify(message, device.node_id)
    device.answer(Message(seal(b"honest"), reply_to=message), 0.0)
    (reply,) = grid.pull_messages([message_id])
    assert unseal(reply) == b"honest"
    other.deactivate(other.node_id)


def test_a_device_that_never_answers_is_given_up(grid: RunGrid, device: FleetLink) -> None:
    grid._longest = 0.2
    message_id = ask(grid, device)
    assert device.pull() is not None  # taken, and lost on the way
    assert grid.pull_messages([message_id]) == []
    time.sleep(0.3)
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert "no answer" in (reply.error.reason or "")


def test_stragglers_get_a_multiple_of_what_half_of_the_devices_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    batch = grid_module._Batch(4, 10_000.0)
    now[0] = 100.0
    batch.answer()
    assert not batch.over()
    batch.answer()  # half, after 100 s
    now[0] = 499.0
    assert not batch.over()
    now[0] = 501.0
    assert batch.over()


def test_a_run_that_is_over_wants_no_answer(endpoint: Endpoint, device: FleetLink) -> None:
    with endpoint.link.open_run(60.0) as grid:
        ask(grid, device)
        message = take(device)
    with pytest.raises(RunOverError):
        device.answer(Message(seal(b"late"), reply_to=message), 0.0)


def test_a_kill_of_the_listener_is_seen_by_both_sides_and_mended(tmp_path: Path) -> None:
    for endpoint in listening(tmp_path):
        check_kill_and_restart(endpoint, endpoint.listener)


def check_kill_and_restart(endpoint: Endpoint, listener: Listener) -> None:
    device = endpoint.newcomer()
    device.activate()
    with pytest.raises(LinkLostError), endpoint.link.open_run(60.0) as grid:  # noqa: PT012  # both lines are the point
        kill(listener)
        grid.get_node_ids()
    key = listener.start()
    link = listener.link(key, endpoint.reports.append)
    link.wait_until_ready()
    with pytest.raises(UnreachableError, match="503"):
        device.pull()  # nobody is let in before everybody is known
    listener.open()
    with pytest.raises(UnknownDeviceError):
        device.pull()  # the new process knows nobody
    link.register("newcomer", device._signer.public)
    device.activate()
    with link.open_run(60.0) as grid:
        assert device.node_id in grid.get_node_ids()
    link.close()


def kill(listener: Listener) -> None:
    assert listener._process is not None
    listener._process.kill()
    listener._process.wait()
