"""Fedtune relies on these internals of Flower; an upgrade of flwr that changes any of them fails here first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from endpoint import Endpoint, listening
from flwr.app import Message

from fedtune.client.live.fleet_link import Answer, FleetLink, note_of, recalled
from fedtune.client.live.signed_http import RunOverError, UnknownDeviceError, UnreachableError
from fedtune.core.host.trusted_server import ServerClock
from fedtune.core.protocol.bundles import COLLECT, SEND
from fedtune.core.protocol.device_calls import ANNOUNCE, APPEND, BRING, MAX_PIECE_BYTES, READ_PART, TAKE, Assignment
from fedtune.core.protocol.messages import Refusal, Request
from fedtune.flower import run_grid as grid_module
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.run_grid import LinkLostError, RunGrid
from fedtune.server.live.sockets import Listener


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from listening(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture
def device(endpoint: Endpoint) -> Iterator[FleetLink]:
    link = endpoint.newcomer()
    link.connect()
    yield link
    link.leave()
    link.close()


@pytest.fixture
def grid(endpoint: Endpoint) -> Iterator[RunGrid]:
    with endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.anything", 900_000)
        yield grid


def take(device: FleetLink) -> tuple[Assignment, Request]:
    """Returns the message that waits for a device."""
    task = device.take()
    assert task is not None
    return task, device.fetch(task)


def answer(device: FleetLink, task: Assignment, outcome: bytes | Refusal) -> None:
    device.answer(task, Answer(outcome, 0.0))


def ask(grid: RunGrid, endpoint: Endpoint, device: FleetLink, payload: bytes = b"question") -> str:
    (message_id,) = grid.push_messages([Message(seal(payload), endpoint.node(device), "query.anything", ttl=600)])
    assert message_id
    return message_id


@pytest.mark.parametrize("size", [0, 1, 1000, 900_000])
def test_payloads_cross_both_ways_bit_for_bit(grid: RunGrid, device: FleetLink, endpoint: Endpoint, size: int) -> None:
    payload = np.random.default_rng(size).bytes(size)
    message_id = ask(grid, endpoint, device, payload)
    task, request = take(device)
    assert (task.action, request.parts) == ("query.anything", (payload,))
    assert grid.pull_messages([message_id]) == []
    answer(device, task, payload[::-1])
    (reply,) = grid.pull_messages([message_id])
    assert (unseal(reply), reply.metadata.src_node_id) == (payload[::-1], endpoint.node(device))
    assert reply.metadata.reply_to_message_id == message_id
    assert grid.pull_messages([message_id]) == []


def test_small_messages_take_two_requests_and_large_ones_go_piece_by_piece(
    grid: RunGrid, device: FleetLink, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    send = httpx.Client.send

    def noted(client: httpx.Client, request: httpx.Request, **settings: Any) -> httpx.Response:
        calls.append(request.url.path)
        return send(client, request, **settings)

    monkeypatch.setattr(httpx.Client, "send", noted)
    for size in (20_000, 2 * MAX_PIECE_BYTES):
        message_id = ask(grid, endpoint, device, bytes(size))
        answer(device, take(device)[0], bytes(size))
        (reply,) = grid.pull_messages([message_id])
        assert len(unseal(reply)) == size
        if size < MAX_PIECE_BYTES:
            assert calls[-4:] == [SEND, TAKE, BRING, COLLECT]
    assert {READ_PART, ANNOUNCE, APPEND} < set(calls)


def test_messages_too_large_for_one_request_reach_everyone(device: FleetLink, endpoint: Endpoint) -> None:
    other = endpoint.newcomer()
    other.connect()
    devices = [device, device, other, other]
    payloads = [np.random.default_rng(size).bytes(size) for size in (30_000, 30_000, 70_000, 10)]
    with endpoint.link.open_run(60.0, batch_bytes=50_000) as grid:
        messages = [
            Message(seal(payload), endpoint.node(link), "query.anything", ttl=600)
            for link, payload in zip(devices, payloads, strict=True)
        ]
        assert all(grid.push_messages(messages))
        assert sorted(take(link)[1].parts[0] for link in devices) == sorted(payloads)
        assert device.take() is None
        assert other.take() is None
    other.leave()


def test_an_error_reply_comes_from_the_device_that_was_asked(
    grid: RunGrid, device: FleetLink, endpoint: Endpoint
) -> None:
    message_id = ask(grid, endpoint, device)
    answer(device, take(device)[0], Refusal("no memory left"))
    (reply,) = grid.pull_messages([message_id])
    assert (reply.error.reason, reply.metadata.src_node_id) == ("no memory left", endpoint.node(device))


@pytest.mark.parametrize(
    ("refusal", "sits_out"),
    [(Refusal("the battery is low", sits_out=True), True), (Refusal("nobody here sits out: not so"), False)],
)
def test_a_device_sits_out_by_the_code_of_its_refusal_and_not_by_its_words(
    grid: RunGrid, device: FleetLink, endpoint: Endpoint, refusal: Refusal, sits_out: bool
) -> None:
    message_id = ask(grid, endpoint, device)
    answer(device, take(device)[0], refusal)
    (reply,) = grid.pull_messages([message_id])
    assert reply.error.reason == refusal.reason
    assert grid.sitting_out() == ({endpoint.node(device)} if sits_out else set())
    assert grid.sitting_out() == set()


def test_all_are_asked_the_same_and_told_apart(grid: RunGrid, device: FleetLink, endpoint: Endpoint) -> None:
    other = endpoint.newcomer()
    other.connect()
    with ThreadPoolExecutor(1) as thread:
        nodes = [endpoint.node(device), endpoint.node(other)]
        asked = thread.submit(grid.ask, nodes, "query.anything", "registration", b"question", 20.0)
        for link, outcome in ((device, b"yes"), (other, Refusal("no"))):
            while (task := link.take()) is None:
                time.sleep(0.02)
            assert (task.group, link.fetch(task).parts) == ("registration", (b"question",))
            answer(link, task, outcome)
        answers = asked.result()
    assert answers[endpoint.node(device)] == b"yes"
    assert str(answers[endpoint.node(other)]).startswith("no answer: no (code")
    other.leave()


def test_a_device_that_forgot_everything_can_still_say_so(grid: RunGrid, device: FleetLink, endpoint: Endpoint) -> None:
    message_id = ask(grid, endpoint, device)
    task = device.take()
    assert task is not None
    device.fetch(task)
    again = recalled(note_of(task))
    assert again.message == task.message
    answer(device, again, Refusal("interrupted"))
    (reply,) = grid.pull_messages([message_id])
    assert reply.error.reason == "interrupted"


def test_a_reply_may_be_brought_twice(grid: RunGrid, device: FleetLink, endpoint: Endpoint) -> None:
    message_id = ask(grid, endpoint, device)
    task, made = take(device)[0], Answer(b"once", 0.0)
    device.answer(task, made)
    device.answer(task, made)
    assert [unseal(found) for found in grid.pull_messages([message_id])] == [b"once"]


@pytest.mark.parametrize("ahead", [172_800.0, -172_800.0])
def test_a_device_whose_clock_is_days_off_is_heard(grid: RunGrid, endpoint: Endpoint, ahead: float) -> None:
    device = endpoint.newcomer(ServerClock(lambda: time.time() + ahead))
    device.connect()
    assert device.clock_error == pytest.approx(ahead, abs=2.0)
    message_id = ask(grid, endpoint, device)
    device.answer(take(device)[0], Answer(b"late or early", 0.0))
    (heard,) = grid.pull_messages([message_id])
    assert unseal(heard) == b"late or early"
    device.leave()


def test_a_device_that_goes_is_reported_at_once(grid: RunGrid, endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    device.connect()
    message_id = ask(grid, endpoint, device)
    device.leave()
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.metadata.src_node_id == endpoint.node(device)


def test_a_device_that_goes_after_its_answer_is_heard_first(grid: RunGrid, endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    for size in (10, 2 * MAX_PIECE_BYTES):
        device.connect()
        node = endpoint.node(device)
        message_id = ask(grid, endpoint, device)
        answer(device, take(device)[0], bytes(size))
        device.leave()
        assert node in grid.get_node_ids()
        (reply,) = grid.pull_messages([message_id])
        assert len(unseal(reply)) == size
        assert node not in grid.get_node_ids()


def test_a_device_that_comes_back_before_its_answer_is_collected_stays(grid: RunGrid, endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    device.connect()
    message_id = ask(grid, endpoint, device)
    answer(device, take(device)[0], b"answer")
    device.leave()
    device.connect()
    (reply,) = grid.pull_messages([message_id])
    assert unseal(reply) == b"answer"
    assert endpoint.node(device) in grid.get_node_ids()
    device.leave()
    assert endpoint.node(device) not in grid.get_node_ids()


def test_a_device_cannot_answer_for_another(grid: RunGrid, device: FleetLink, endpoint: Endpoint) -> None:
    other = endpoint.newcomer()
    other.connect()
    message_id = ask(grid, endpoint, device)
    task, _ = take(device)
    with pytest.raises(RunOverError):
        answer(other, task, b"forged")
    assert grid.pull_messages([message_id]) == []
    answer(device, task, b"honest")
    (reply,) = grid.pull_messages([message_id])
    assert unseal(reply) == b"honest"
    other.leave()


def test_a_device_that_never_answers_is_given_up(endpoint: Endpoint, device: FleetLink) -> None:
    with endpoint.link.open_run(0.2) as grid:
        message_id = ask(grid, endpoint, device)
        assert device.take() is not None  # the device's answer is lost in transit
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
    batch.answer()  # the first half, after 100 s
    now[0] = 499.0
    assert not batch.over()
    now[0] = 501.0
    assert batch.over()


def test_a_run_that_is_over_wants_no_answer(endpoint: Endpoint, device: FleetLink) -> None:
    with endpoint.link.open_run(60.0) as grid:
        ask(grid, endpoint, device)
        task, _ = take(device)
    with pytest.raises(RunOverError):
        answer(device, task, b"late")


def test_a_kill_of_the_listener_is_seen_by_both_sides_and_mended(tmp_path: Path) -> None:
    for endpoint in listening(tmp_path):
        check_kill_and_restart(endpoint, endpoint.listener)


def check_kill_and_restart(endpoint: Endpoint, listener: Listener) -> None:
    device = endpoint.newcomer()
    device.connect()
    with pytest.raises(LinkLostError), endpoint.link.open_run(60.0) as grid:  # noqa: PT012  # both lines are the point
        kill(listener)
        grid.get_node_ids()
    key = listener.start()
    link = listener.link(key, endpoint.reports.append)
    link.wait_until_ready()
    with pytest.raises(UnreachableError, match="503"):
        device.take()  # no device is admitted before all are known
    listener.open()
    with pytest.raises(UnknownDeviceError):
        device.take()  # the new process knows no device
    link.register("newcomer", device.public_key)
    device.connect()
    with link.open_run(60.0) as grid:
        (node,) = [each.node_id for each in link.nodes() if each.public_key == device.public_key]
        assert node in grid.get_node_ids()
    link.close()


def kill(listener: Listener) -> None:
    assert listener._process is not None
    listener._process.kill()
    listener._process.wait()
