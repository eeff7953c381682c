"""The guard of the public port: unauthenticated connections, and requests that no honest device sends, are refused."""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from endpoint import Endpoint, listening
from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.supercore.fab import Fab

from fedtune.client.live.fleet_link import Answer, FleetLink
from fedtune.client.live.signed_http import (
    NotAdmittedError,
    RunOverError,
    UnknownDeviceError,
    UnreachableError,
    UntrustedError,
)
from fedtune.core.errors import PeerError
from fedtune.core.host.trusted_server import ServerClock
from fedtune.core.manifest.joining import load_node_key, make_node_key
from fedtune.core.protocol.bundles import COLLECT, SEND, CollectReplies, SendMessages
from fedtune.core.protocol.device_calls import (
    ANNOUNCE,
    APPEND,
    BEAT,
    BRING,
    CONNECT,
    LEAVE,
    MAX_CALL_BYTES,
    MAX_PIECE_BYTES,
    READ_PART,
    TAKE,
    AnnounceAnswer,
    AppendPiece,
    BringAnswer,
    ReadPart,
    Received,
    Refused,
)
from fedtune.core.protocol.messages import HEADER_BYTES, decode, encode
from fedtune.core.protocol.signed_requests import KEY_HEADER, SIGNATURE_HEADER, sign
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.guard import CONTROL_HEADER, DEVICE_CALLS
from fedtune.flower.run_grid import RunGrid
from fedtune.server.live.certificates import make_authority, make_server_certificate


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from listening(tmp_path_factory.mktemp("endpoint"))


OUTSIDE = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/unregister-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/get-nodes",
    "/v1/runtime/push-messages",
    SEND,
    COLLECT,
    "/v1/fleet/activate-node",
    "/v1/fleet/send-node-heartbeat",
    "/v1/fleet/pull-messages",
    "/v1/fleet/push-messages",
    "/v1/fleet/push-object",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/get-fab",
    "/v1/fleet/get-run",
    "/health",
    "/docs",
    "/openapi.json",
    "/",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_but_device_calls_exists_for_the_outside(endpoint: Endpoint, path: str) -> None:
    assert endpoint.post(path).status_code == 404
    assert endpoint.post(path).content == b""
    # The control key has no effect there, since only the private socket accepts it.
    assert endpoint.post(path, {CONTROL_HEADER: endpoint.key}).status_code == 404


TRICKS = [
    "/v1/device/../control/list-runs",
    "/v1/device/%2e%2e/control/list-runs",
    "/v1/device/..%2fcontrol/list-runs",
    "/v1/device/%2e%2e%2fcontrol%2flist-runs",
    "/v1/device/take/../../control/list-runs",
    "//v1/control/list-runs",
    "/v1/device/take/",
    "/v1/device/take%00",
    "/V1/DEVICE/TAKE",
    "https://localhost/v1/control/list-runs",
    "/v1/device/x?/../../control/list-runs",
    "/v1/control/list-runs#/v1/device/take",
]


@pytest.mark.parametrize("target", TRICKS)
@pytest.mark.parametrize("extra", ["", "x-forwarded-for: 127.0.0.1\r\nx-forwarded-prefix: /v1/fleet\r\n"])
def test_paths_that_play_tricks_lead_nowhere(endpoint: Endpoint, target: str, extra: str) -> None:
    head = f"POST {target} HTTP/1.1\r\nhost: localhost:{endpoint.listener.private_port}\r\n{extra}"
    request = f"{head}content-type: application/protobuf\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    answer = endpoint.raw(request.encode())
    assert answer.split()[1:2] in ([b"404"], [b"400"]), answer[:200]
    assert b"run" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"])
def test_other_methods_lead_nowhere(endpoint: Endpoint, method: str) -> None:
    answer = endpoint.raw(f"{method} /v1/device/take HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert answer.split()[1:2] in ([b"404"], [b"400"])


def test_a_websocket_is_refused(endpoint: Endpoint) -> None:
    upgrade = b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    answer = endpoint.raw(b"GET /v1/device/take HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n")
    assert b" 101 " not in answer.split(b"\r\n")[0]


def test_a_body_is_measured_before_it_is_read(endpoint: Endpoint) -> None:
    head = b"POST /v1/device/append HTTP/1.1\r\nhost: x\r\n"
    too_large = endpoint.raw(head + f"content-length: {MAX_CALL_BYTES + 1}\r\n\r\n".encode())
    assert too_large.split()[1] == b"413"
    absurd = endpoint.raw(head + b"content-length: 99999999999999999999\r\n\r\n")
    assert absurd.split()[1] in (b"413", b"400")
    assert endpoint.raw(head + b"connection: close\r\n\r\n").split()[1] == b"411"
    chunked = endpoint.raw(head + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert chunked.split()[1] == b"411"


@pytest.mark.parametrize("path", [BRING, APPEND])
def test_no_byte_of_an_unauthenticated_clients_body_is_read(endpoint: Endpoint, path: str) -> None:
    """An incomplete body is refused too; a server that waited for the rest would keep the part that came."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {MAX_CALL_BYTES}\r\n"
    assert endpoint.raw(head.encode() + b"\r\n" + bytes(1000)).split()[1] == b"401"
    unknown = signed(load_node_key(make_node_key()))
    shown = "".join(f"{name}: {value}\r\n" for name, value in unknown.items())
    assert endpoint.raw((head + shown).encode() + b"\r\n" + bytes(1000)).split()[1] == b"401"


ID = "ab" * 32


def test_what_is_no_call_of_a_device_is_refused(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    key = endpoint.key_of(device)
    device.connect()
    for path, body in (
        (TAKE, b"x"),
        (BRING, b"\xff" * 1000),
        (BRING, encode(BringAnswer("../escape", 0.0, b""))),
        (BRING, encode(BringAnswer(ID, -1.0, b""))),
        (BRING, encode(BringAnswer(ID, float("nan"), b""))),
        (BRING, encode(BringAnswer(ID, 0.0, bytes(MAX_PIECE_BYTES + 1)))),
        (BRING, encode(BringAnswer(ID, 0.0, b"", Refused("x" * 501, False)))),
        (ANNOUNCE, encode(AnnounceAnswer(ID, 0.0, 1, bytes(32)))),
        (ANNOUNCE, encode(AnnounceAnswer(ID, 0.0, 1 << 40, bytes(32)))),
        (ANNOUNCE, encode(AnnounceAnswer(ID, 0.0, 1 << 20, b"short"))),
        (APPEND, encode(AppendPiece(ID, -1, b"x"))),
        (APPEND, encode(AppendPiece(ID, 0, b""))),
        (READ_PART, encode(ReadPart(ID, 2, 0))),
    ):
        assert send(endpoint, key, path, body).status_code == 400, (path, body[:40])


def test_of_an_answer_that_is_not_the_announced_one_nothing_is_kept(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    key = endpoint.key_of(device)
    with endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.anything", 200_000)
        device.connect()
        (message_id,) = push(grid, endpoint, device, "query.anything")
        task = device.take()
        assert task is not None
        payload = os.urandom(200_000)
        assert announce(endpoint, key, message_id, payload).status_code == 200
        first, rest = payload[:MAX_PIECE_BYTES], payload[MAX_PIECE_BYTES:]
        assert append(endpoint, key, message_id, 0, first).status_code == 200
        assert append(endpoint, key, message_id, len(first), bytes(len(rest))).status_code == 400
        assert grid.pull_messages([message_id]) == []
        device.answer(task, Answer(payload, 0.0))
        (heard,) = grid.pull_messages([message_id])
        assert unseal(heard) == payload


def test_the_servers_own_bundles_want_the_token_of_a_run_too(endpoint: Endpoint) -> None:
    shown = {CONTROL_HEADER: endpoint.key}
    for path, payload in (
        (SEND, SendMessages(b"", {}, (), ())),
        (COLLECT, CollectReplies(())),
    ):
        assert endpoint.post(path, shown, server=endpoint.private, body=encode(payload)).status_code == 401
        assert endpoint.post(path, server=endpoint.private, body=encode(payload)).status_code == 404


def push(grid: RunGrid, endpoint: Endpoint, device: FleetLink, *kinds: str) -> list[str]:
    """Sends a question of each of these types to a device; returns their ids."""
    node = endpoint.node(device)
    return list(grid.push_messages([Message(seal(b"question"), node, kind, ttl=600) for kind in kinds]))


def announce(endpoint: Endpoint, key: ec.EllipticCurvePrivateKey, message: str, payload: bytes) -> httpx.Response:
    digest = hashlib.sha256(payload).digest()
    return send(endpoint, key, ANNOUNCE, encode(AnnounceAnswer(message, 0.0, len(payload), digest)))


def append(
    endpoint: Endpoint, key: ec.EllipticCurvePrivateKey, message: str, offset: int, piece: bytes
) -> httpx.Response:
    return send(endpoint, key, APPEND, encode(AppendPiece(message, offset, piece)))


def test_a_reply_takes_no_more_room_than_its_request_could_give(endpoint: Endpoint) -> None:
    device, size = endpoint.newcomer(), 300_000
    key = endpoint.key_of(device)
    with endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.long", size)
        device.connect()
        long, short = push(grid, endpoint, device, "query.long", "query.short")
        tasks = {task.message: task for task in (device.take(), device.take()) if task is not None}
        assert announce(endpoint, key, long, os.urandom(size + 1)).status_code == 413
        assert announce(endpoint, key, short, os.urandom(MAX_PIECE_BYTES + 1)).status_code == 413
        for payload in (os.urandom(HEADER_BYTES + 1), os.urandom(size)):
            with pytest.raises(PeerError, match="refuses a message of this size"):
                device.answer(tasks[short], Answer(payload, 0.0))
        whole = os.urandom(size)
        assert announce(endpoint, key, long, whole).status_code == 200
        start = 0
        for _ in range(2):
            append(endpoint, key, long, start, whole[start : start + MAX_PIECE_BYTES])
            start += MAX_PIECE_BYTES
        assert append(endpoint, key, long, start, bytes(size - start + 1)).status_code == 413
        device.answer(tasks[short], Answer(b"answer", 0.0))
        device.answer(tasks[long], Answer(whole, 0.0))
        heard = grid.pull_messages([short, long])
        assert [unseal(reply) for reply in heard] == [b"answer", whole]


def test_a_large_answer_goes_on_where_it_was_and_is_the_only_one(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    key, payload, other = endpoint.key_of(device), os.urandom(200_000), os.urandom(200_000)

    def received(response: httpx.Response) -> int:
        return decode(response.content, Received).size

    with endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.long", 200_000)
        device.connect()
        (message,) = push(grid, endpoint, device, "query.long")
        assert append(endpoint, key, message, 0, b"x").status_code == 403  # nothing was announced
        task = device.take()
        assert task is not None
        assert received(announce(endpoint, key, message, payload)) == 0
        assert received(append(endpoint, key, message, 0, payload[:1000])) == 1000
        assert received(append(endpoint, key, message, 0, payload[:1000])) == 1000  # brought twice
        assert received(append(endpoint, key, message, 5000, b"gap")) == 1000
        assert received(announce(endpoint, key, message, payload)) == 1000
        assert received(announce(endpoint, key, message, other)) == 0  # the device's new process answers otherwise
        device.answer(task, Answer(payload, 0.0))
        assert received(announce(endpoint, key, message, payload)) == 200_000
        for outcome in (b"else", other):
            with pytest.raises(RunOverError):
                device.answer(task, Answer(outcome, 0.0))
        (heard,) = grid.pull_messages([message])
        assert unseal(heard) == payload


def test_a_message_is_answered_by_the_device_that_has_taken_it(endpoint: Endpoint) -> None:
    ada, eve = endpoint.newcomer(), endpoint.newcomer()
    key, large = endpoint.key_of(eve), os.urandom(MAX_PIECE_BYTES + 1)
    with endpoint.link.open_run(60.0) as grid:
        ada.connect()
        eve.connect()
        (small,) = push(grid, endpoint, ada, "query.anything")
        (message,) = grid.push_messages([Message(seal(large), endpoint.node(ada), "query.anything", ttl=600)])
        assert send(endpoint, endpoint.key_of(ada), BRING, encode(BringAnswer(small, 0.0, b"early"))).status_code == 403
        tasks = [ada.take(), ada.take()]
        for path, body in (
            (READ_PART, ReadPart(message, 0, 0)),
            (BRING, BringAnswer(small, 0.0, b"forged")),
            (ANNOUNCE, AnnounceAnswer(small, 0.0, 200_000, bytes(32))),
            (APPEND, AppendPiece(small, 0, b"x")),
        ):
            assert send(endpoint, key, path, encode(body)).status_code == 403
        assert eve.take() is None
        assert sorted(ada.fetch(task).parts[0] for task in tasks if task) == sorted([b"question", large])
        assert send(endpoint, endpoint.key_of(ada), READ_PART, encode(ReadPart(message, 0, 1 << 20))).status_code == 400


def test_a_reply_that_nobody_waits_for_is_not_stored(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    key = endpoint.key_of(device)
    device.connect()
    assert send(endpoint, key, BRING, encode(BringAnswer(ID, 0.0, b"answer"))).status_code == 403
    assert announce(endpoint, key, ID, os.urandom(200_000)).status_code == 403


def test_a_piece_is_no_larger_than_devices_make_them(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    assert send(endpoint, endpoint.key_of(device), APPEND, bytes(MAX_CALL_BYTES + 1)).status_code == 413


def test_a_device_that_never_answers_leaves_no_growing_list(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    with endpoint.link.open_run(60.0) as grid:
        device.connect()
        tasks = []
        for _ in range(17):
            push(grid, endpoint, device, "query.anything")
            tasks.append(device.take())
        first, *_, last = tasks
        assert first is not None
        assert last is not None
        with pytest.raises(RunOverError):
            device.answer(first, Answer(b"late", 0.0))
        device.answer(last, Answer(b"answer", 0.0))


def test_garbage_in_a_device_call_is_refused_and_harms_nothing(endpoint: Endpoint) -> None:
    for path in sorted(DEVICE_CALLS):
        assert 400 <= endpoint.post(path, body=b"\xff" * 1000).status_code < 600
    endpoint.newcomer().connect()


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/health", "/docs"])
def test_the_private_socket_wants_the_control_key_from_local_users_too(endpoint: Endpoint, path: str) -> None:
    assert endpoint.post(path, server=endpoint.private).status_code == 404
    assert endpoint.post(path, {CONTROL_HEADER: "0" * 64}, server=endpoint.private).status_code == 404
    with pytest.raises(UnreachableError, match="not a fedtune server"):
        endpoint.device("bob", endpoint.private).connect()


def test_a_foreign_run_is_ended_and_nothing_of_it_is_run(endpoint: Endpoint, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    code = f"import pathlib\npathlib.Path({str(trap)!r}).write_text('run')\nimport flwr.serverapp\n"
    files = {
        "pyproject.toml": (
            b'[project]\nname = "evil"\nversion = "1.0.0"\ndescription = ""\ndependencies = []\n'
            b'[tool.flwr.app]\npublisher = "eve"\n'
            b'[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n'
        ),
        "evil.py": code.encode(),
    }
    app = build_fab_from_files(files)[0]
    # Eve has stolen the control key, so this is the last line of defence.
    control = endpoint.link._control
    fab = fab_to_proto(Fab("", app, {}))
    run_id = control.StartRun(StartRunRequest(fab=fab)).run_id
    endpoint.link.refuse_foreign_runs()
    run = control.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
    assert (run.status.status, run.status.sub_status) == ("finished", "failed")
    assert any("refused foreign run" in report for report in endpoint.reports)
    # While the server begins its own run, Eve's run does not get in between.
    control.StartRun(StartRunRequest(fab=fab))
    with endpoint.link.open_run(60.0) as grid:
        assert grid.run.fab_id == "fedtune/fedtune"
    assert not trap.exists()


def signed(
    key: ec.EllipticCurvePrivateKey, path: str = "", body: bytes = b"", moment: datetime.datetime | None = None
) -> dict[str, str]:
    return sign(key, path, (moment or datetime.datetime.now(datetime.UTC)).timestamp(), body)


def send(endpoint: Endpoint, key: ec.EllipticCurvePrivateKey, path: str, body: bytes) -> httpx.Response:
    """Sends a device's signed request."""
    return endpoint.post(path, signed(key, path, body), body=body)


def test_a_request_without_a_signature_is_refused(endpoint: Endpoint) -> None:
    for path in sorted(DEVICE_CALLS):
        assert endpoint.post(path).status_code in (401, 400), path  # 400: a request to join is signed by itself


def test_a_key_that_was_never_enrolled_does_not_get_in(endpoint: Endpoint) -> None:
    unknown = FleetLink(endpoint.public, endpoint.home.authority, make_node_key())
    endpoint.lines.append(unknown)
    with pytest.raises((NotAdmittedError, UnknownDeviceError)):
        unknown.connect()


def test_a_device_cannot_speak_as_another(endpoint: Endpoint) -> None:
    eve, ada = (load_node_key(endpoint.bundles[name].node_key) for name in ("eve", "ada"))
    stolen = signed(eve, TAKE) | {KEY_HEADER: signed(ada, TAKE)[KEY_HEADER]}
    assert endpoint.post(TAKE, stolen).status_code == 401
    assert endpoint.post(TAKE).status_code == 401  # not signed at all


def test_an_old_signature_is_refused(endpoint: Endpoint) -> None:
    eve = load_node_key(endpoint.bundles["eve"].node_key)
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=10)
    assert endpoint.post(CONNECT, signed(eve, CONNECT, b"", old)).status_code == 401
    garbled = signed(eve, CONNECT) | {SIGNATURE_HEADER: b64encode(b"0" * 70).decode()}
    assert endpoint.post(CONNECT, garbled).status_code == 401


def test_a_proxy_that_ends_tls_can_change_neither_body_nor_path_nor_time(endpoint: Endpoint) -> None:
    eve = endpoint.newcomer()
    eve.connect()
    key = endpoint.key_of(eve)
    good = signed(key, BEAT)
    assert endpoint.post(BEAT, good).status_code == 200
    later = signed(key, BEAT, b"", datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1))
    missing = {name: value for name, value in good.items() if name != SIGNATURE_HEADER}
    forged = [good | {SIGNATURE_HEADER: value} for value in ("", "AA", "#", later[SIGNATURE_HEADER])]
    for headers in (missing, *forged, good | {KEY_HEADER: "AA=="}):
        assert endpoint.post(BEAT, headers).status_code == 401, headers
    assert endpoint.post(BEAT, good, body=b"other").status_code == 401
    assert endpoint.post(LEAVE, good).status_code == 401


def test_a_wrong_clock_is_corrected_by_the_servers(endpoint: Endpoint) -> None:
    device = endpoint.newcomer(ServerClock(lambda: time.time() + 3600.0))
    device.connect()
    assert abs(device.clock_error - 3600.0) < 2.0
    device.leave()


def test_a_revoked_device_is_cut_off_at_its_next_request(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    device.connect()
    assert device.take() is None
    endpoint.link.unregister(endpoint.node(device))
    with pytest.raises(UnknownDeviceError, match="revoked"):
        device.take()
    with pytest.raises(UnknownDeviceError):
        device.beat()
    with pytest.raises((NotAdmittedError, UnknownDeviceError)):
        device.connect()


def test_a_device_trusts_its_own_authority_only(endpoint: Endpoint) -> None:
    device = FleetLink(endpoint.public, make_authority().certificate, endpoint.bundles["ada"].node_key)
    endpoint.lines.append(device)
    with pytest.raises(UntrustedError, match="certificate"):
        device.connect()


def test_a_server_under_another_name_is_not_trusted(endpoint: Endpoint) -> None:
    device = FleetLink(f"127.1:{endpoint.listener.port}", endpoint.home.authority, endpoint.bundles["ada"].node_key)
    endpoint.lines.append(device)
    with pytest.raises(UntrustedError, match=r"certificate"):
        device.connect()


def test_an_expired_certificate_is_not_trusted(tmp_path: Path) -> None:
    """The TLS server's certificate is of the fleet's own authority, but it expired yesterday."""
    authority = make_authority()
    expired = make_server_certificate(authority, ["localhost"], days=-1)
    (tmp_path / "pem").write_bytes(expired.certificate)
    (tmp_path / "key").write_bytes(expired.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                with listener.accept()[0] as line:
                    context.wrap_socket(line, server_side=True)
            except OSError:
                pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        device = FleetLink(f"localhost:{listener.getsockname()[1]}", authority.certificate, make_node_key())
        with pytest.raises(UntrustedError, match=r"certificate has expired; by this device's clock it is 2"):
            device.connect()
        device.close()
        thread.join(5)
