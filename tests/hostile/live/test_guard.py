"""The guard of the public port: unauthenticated connections, and requests that no honest device sends, are refused."""

from __future__ import annotations

import datetime
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
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata as MetadataProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.primitives.asymmetric import sign_message

from fedtune.client.client_commands import PIECE_BYTES
from fedtune.core.errors import PeerError
from fedtune.core.host.trusted_server import ServerClock
from fedtune.core.manifest.joining import load_node_key, make_node_key
from fedtune.core.protocol.bundles import (
    BRING,
    COLLECT,
    MAX_BUNDLE_BYTES,
    MAX_OBJECTS,
    SEND,
    TAKE,
    BringReply,
    CollectReplies,
    SendMessages,
    TakeMessage,
)
from fedtune.core.protocol.messages import HEADER_BYTES, encode
from fedtune.core.protocol.signed_requests import KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER, public_pem, sign
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.fleet_link import Answer, FleetLink, Task
from fedtune.flower.guard import CONTROL_HEADER, DEVICE_CALLS, MAX_BODY_BYTES
from fedtune.flower.reply_bounds import MAX_PIECE_BODY_BYTES, ReplyBound
from fedtune.flower.signed_http import (
    NotAdmittedError,
    RunOverError,
    UnknownDeviceError,
    UnreachableError,
    UntrustedError,
)
from fedtune.server.live.certificates import make_authority, make_server_certificate


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from listening(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has large replies made in the pieces of a device's process."""
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", PIECE_BYTES)


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
    "/v1/fleet/pull-messages",
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
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/%2e%2e%2fcontrol%2flist-runs",
    "/v1/fleet/push-messages/../../control/list-runs",
    "//v1/control/list-runs",
    "/v1/fleet/push-messages/",
    "/v1/fleet/push-messages%00",
    "/V1/FLEET/PUSH-MESSAGES",
    "https://localhost/v1/control/list-runs",
    "/v1/fleet/x?/../../control/list-runs",
    "/v1/control/list-runs#/v1/fleet/push-messages",
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
    answer = endpoint.raw(f"{method} /v1/fleet/push-messages HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert answer.split()[1:2] in ([b"404"], [b"400"])


def test_a_websocket_is_refused(endpoint: Endpoint) -> None:
    upgrade = b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    answer = endpoint.raw(b"GET /v1/fleet/push-messages HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n")
    assert b" 101 " not in answer.split(b"\r\n")[0]


def test_a_body_is_measured_before_it_is_read(endpoint: Endpoint) -> None:
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-type: application/protobuf\r\n"
    too_large = endpoint.raw(head + f"content-length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
    assert too_large.split()[1] == b"413"
    absurd = endpoint.raw(head + b"content-length: 99999999999999999999\r\n\r\n")
    assert absurd.split()[1] in (b"413", b"400")
    assert endpoint.raw(head + b"connection: close\r\n\r\n").split()[1] == b"411"
    chunked = endpoint.raw(head + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert chunked.split()[1] == b"411"


@pytest.mark.parametrize("path", [TAKE, BRING, "/v1/fleet/push-messages", "/v1/fleet/activate-node"])
def test_no_byte_of_an_unauthenticated_clients_body_is_read(endpoint: Endpoint, path: str) -> None:
    """An incomplete body is refused too; a server that waited for the rest would keep the part that came."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/protobuf\r\ncontent-length: {MAX_BODY_BYTES}\r\n"
    )
    assert endpoint.raw(head.encode() + b"\r\n" + bytes(1000)).split()[1] == b"401"
    unknown = signed(load_node_key(make_node_key()))
    shown = "".join(f"{name}: {value}\r\n" for name, value in unknown.items())
    assert endpoint.raw((head + shown).encode() + b"\r\n" + bytes(1000)).split()[1] == b"401"


def bundle(
    node_id: int, name: int | None = None, messages: int = 1, objects: dict[str, bytes] | None = None
) -> BringReply:
    """Makes a reply from this node, under any name."""
    head = MessageProto(metadata=MetadataProto(src_node_id=node_id if name is None else name, run_id=1))
    request = PushMessagesRequest(
        node=Node(node_id=node_id), messages_list=[head] * messages, message_object_trees=[ObjectTree()] * messages
    )
    return BringReply(request.SerializeToString(), objects or {})


def test_a_bundle_is_one_reply_of_its_sender_and_bounded(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    key, node_id = endpoint.key_of(device), device.activate()
    many = {f"{number:064x}": b"" for number in range(MAX_OBJECTS + 1)}
    for bad in (
        bundle(node_id, name=node_id + 1),
        bundle(node_id, messages=0),
        bundle(node_id, messages=2),
        bundle(node_id, objects=many),
        bundle(node_id, objects={"../escape": b""}),
        BringReply(b"\xff" * 100, {}),
    ):
        assert send(endpoint, key, BRING, encode(bad)).status_code == 400, bad
    huge = bundle(node_id, objects={"0" * 64: bytes(MAX_BODY_BYTES)})
    assert send(endpoint, key, BRING, encode(huge)).status_code == 413
    assert send(endpoint, key, TAKE, b"\xff" * 1000).status_code == 400


@pytest.mark.parametrize("spoil", ["content", "missing"])
def test_of_a_spoilt_bundle_nothing_is_kept(endpoint: Endpoint, spoil: str) -> None:
    device = endpoint.newcomer()
    with endpoint.link.open_run(60.0) as grid:
        device.activate()
        (message_id,) = grid.push_messages([Message(seal(b"question"), device.node_id, "query.anything", ttl=600)])
        task = device.pull()
        assert task is not None
        answer = Answer(b"answer", 0.0, time.time())
        whole = device.bundle(task, answer)
        *rest, last = whole.objects
        objects = {name: whole.objects[name] for name in rest}
        spoilt = BringReply(whole.request, objects | {last: b"else"} if spoil == "content" else objects)
        assert send(endpoint, endpoint.key_of(device), BRING, encode(spoilt)).status_code == 400
        assert grid.pull_messages([message_id]) == []
        device.answer(task, answer)
        (heard,) = grid.pull_messages([message_id])
        assert unseal(heard) == b"answer"


def test_the_servers_own_bundles_want_the_token_of_a_run_too(endpoint: Endpoint) -> None:
    shown = {CONTROL_HEADER: endpoint.key}
    for path, payload in (
        (SEND, SendMessages(b"", {}, (), ())),
        (COLLECT, CollectReplies(())),
    ):
        assert endpoint.post(path, shown, server=endpoint.private, body=encode(payload)).status_code == 401
        assert endpoint.post(path, server=endpoint.private, body=encode(payload)).status_code == 404


def test_a_device_that_foresees_a_message_cannot_keep_it_from_the_others(endpoint: Endpoint) -> None:
    """Eve declares the coming message as a part of her reply, without content."""
    eve, ada = endpoint.newcomer(), endpoint.newcomer()
    with endpoint.link.open_run(60.0) as grid:
        eve.activate()
        ada.activate()
        grid.bound_replies("query.open", 1_000_000)  # so that its pieces may come one by one
        grid.push_messages([Message(seal(b"open"), eve.node_id, "query.open", ttl=600)])
        task = eve.pull()
        assert task is not None
        coming = Message(seal(b"survivors"), ada.node_id, "query.vote", ttl=600)
        (foreseen,) = get_object_tree(coming).children
        asked = task.head
        head = MessageProto(
            metadata=MetadataProto(
                run_id=asked.run_id,
                message_id="ab" * 32,
                src_node_id=eve.node_id,
                dst_node_id=asked.src_node_id,
                reply_to_message_id=task.tree.object_id,
                message_type=asked.message_type,
                created_at=time.time(),
                ttl=10.0,
            )
        )
        head.error.code = 1
        lie = ObjectTree(object_id="ab" * 32, children=[ObjectTree(object_id=foreseen.object_id)])
        request = PushMessagesRequest(
            node=Node(node_id=eve.node_id),
            messages_list=[head],
            message_object_trees=[lie],
            clientapp_runtime_list=[0.0],
        )
        pushed = send(endpoint, endpoint.key_of(eve), "/v1/fleet/push-messages", request.SerializeToString())
        assert pushed.status_code == 200
        assert all(grid.push_messages([coming]))
        heard = ada.pull()
        assert heard is not None
        assert ada.fetch(heard).parts == (b"survivors",)


def announcement(task: Task, answer: Answer, device: FleetLink, pieces: int | None = None) -> bytes:
    """Returns the call that announces an answer piece by piece, or as many pieces as a liar likes."""
    request = PushMessagesRequest.FromString(device.bundle(task, answer).request)
    if pieces is not None:
        parts = [ObjectTree(object_id=f"{number:064x}") for number in range(pieces - 1)]
        del request.message_object_trees[0].children[:]
        request.message_object_trees[0].children.extend(parts)
    announced: bytes = request.SerializeToString()
    return announced


def test_a_reply_takes_no_more_room_than_its_request_could_give(endpoint: Endpoint) -> None:
    """A device could have the server store ten thousand pieces, whatever it was asked."""
    device, push, size = endpoint.newcomer(), "/v1/fleet/push-messages", 300_000
    key, bound = endpoint.key_of(device), ReplyBound(size)
    with endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.long", size)
        device.activate()
        messages = [Message(seal(b"question"), device.node_id, kind, ttl=600) for kind in ("query.long", "query.short")]
        grid.push_messages(messages)
        long, short = sorted(filter(None, (device.pull(), device.pull())), key=lambda task: task.action)
        whole, brief = Answer(os.urandom(size), 0.0, time.time()), Answer(b"answer", 0.0, time.time())

        too_many = announcement(long, whole, device, bound.pieces + 1)
        assert send(endpoint, key, push, too_many).status_code == 413
        # An answer that fits into one call is not taken in pieces, and in one call no more than it can have.
        assert send(endpoint, key, push, announcement(short, brief, device)).status_code == 413
        bundle = device.bundle(short, brief)
        stuffed = BringReply(bundle.request, bundle.objects | {"0" * 64: bytes(ReplyBound(HEADER_BYTES).size)})
        assert send(endpoint, key, BRING, encode(stuffed)).status_code == 413
        for payload in (os.urandom(MAX_BUNDLE_BYTES - 2000), os.urandom(size)):
            with pytest.raises(PeerError, match="refuses a message of this size"):
                device.answer(short, Answer(payload, 0.0, time.time()))

        device.answer(short, brief)
        device.answer(long, whole)
        heard = grid.pull_messages([short.tree.object_id, long.tree.object_id])
        assert [unseal(reply) for reply in heard] == [b"answer", whole.outcome]


def test_a_message_has_one_reply_that_may_be_announced_again(endpoint: Endpoint) -> None:
    """Flower knows a repeated reply by its id alone, and took other pieces under it each time."""
    device, push = endpoint.newcomer(), "/v1/fleet/push-messages"
    key = endpoint.key_of(device)
    with endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.long", 1_000_000)
        device.activate()
        grid.push_messages([Message(seal(b"question"), device.node_id, "query.long", ttl=600)])
        task = device.pull()
        assert task is not None
        answer = Answer(os.urandom(200_000), 0.0, time.time())
        for _ in range(2):
            assert send(endpoint, key, push, announcement(task, answer, device)).status_code == 200
        assert send(endpoint, key, push, announcement(task, answer, device, 3)).status_code == 403
        with pytest.raises(RunOverError):
            device.answer(task, Answer(os.urandom(200_000), 0.0, time.time()))
        device.answer(task, answer)
        (heard,) = grid.pull_messages([task.tree.object_id])
        assert unseal(heard) == answer.outcome


def test_a_reply_that_nobody_waits_for_is_not_stored(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    key, node_id = endpoint.key_of(device), device.activate()
    assert send(endpoint, key, BRING, encode(bundle(node_id))).status_code == 403
    request = bundle(node_id).request
    assert send(endpoint, key, "/v1/fleet/push-messages", request).status_code == 403


def test_a_piece_is_no_larger_than_devices_make_them(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    body = bytes(MAX_PIECE_BODY_BYTES + 1)
    assert send(endpoint, endpoint.key_of(device), "/v1/fleet/push-object", body).status_code == 413


def test_a_device_that_never_answers_leaves_no_growing_list(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    with endpoint.link.open_run(60.0) as grid:
        device.activate()
        tasks = []
        for _ in range(17):
            grid.push_messages([Message(seal(b"question"), device.node_id, "query.anything", ttl=600)])
            tasks.append(device.pull())
        first, *_, last = tasks
        assert first is not None
        assert last is not None
        with pytest.raises(RunOverError):
            device.answer(first, Answer(b"late", 0.0, time.time()))
        device.answer(last, Answer(b"answer", 0.0, time.time()))


def test_garbage_in_a_device_call_is_refused_and_harms_nothing(endpoint: Endpoint) -> None:
    for path in sorted(DEVICE_CALLS):
        assert 400 <= endpoint.post(path, body=b"\xff" * 1000).status_code < 600
    assert endpoint.newcomer().activate() > 0


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/health", "/docs"])
def test_the_private_socket_wants_the_control_key_from_local_users_too(endpoint: Endpoint, path: str) -> None:
    assert endpoint.post(path, server=endpoint.private).status_code == 404
    assert endpoint.post(path, {CONTROL_HEADER: "0" * 64}, server=endpoint.private).status_code == 404
    with pytest.raises(UnreachableError, match="not a fedtune server"):
        endpoint.device("bob", endpoint.private).activate()


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
    headers = sign(key, path, (moment or datetime.datetime.now(datetime.UTC)).timestamp(), body)
    shown = b64encode(sign_message(key, headers[TIME_HEADER].encode())).decode()
    return {**headers, FLEET_HTTP_SIGNATURE_HEADER: shown}


def send(endpoint: Endpoint, key: ec.EllipticCurvePrivateKey, path: str, body: bytes) -> httpx.Response:
    """Sends a device's signed request."""
    return endpoint.post(path, signed(key, path, body), body=body)


def test_a_request_without_a_signature_is_refused(endpoint: Endpoint) -> None:
    for path in sorted(DEVICE_CALLS):
        assert endpoint.post(path).status_code in (401, 400), path  # 400: the request does not name its sender


def test_a_key_that_was_never_enrolled_does_not_get_in(endpoint: Endpoint) -> None:
    unknown = FleetLink(endpoint.public, endpoint.home.authority, make_node_key())
    endpoint.lines.append(unknown)
    with pytest.raises((NotAdmittedError, UnknownDeviceError)):
        unknown.activate()


def test_a_device_cannot_speak_as_another(endpoint: Endpoint) -> None:
    ada, eve = endpoint.device("ada"), load_node_key(endpoint.bundles["eve"].node_key)
    node_id = ada.activate()
    for body in (encode(TakeMessage(node_id)), encode(TakeMessage(0))):
        assert send(endpoint, eve, TAKE, body).status_code == 401
        assert endpoint.post(TAKE, body=body).status_code == 401  # not signed at all
    assert send(endpoint, eve, BRING, encode(bundle(node_id))).status_code == 401
    assert endpoint.post(BRING, body=encode(bundle(node_id))).status_code == 401
    claim = ActivateNodeRequest(
        public_key=public_pem(load_node_key(endpoint.bundles["bob"].node_key)),
        heartbeat_interval=30,
    ).SerializeToString()
    assert send(endpoint, eve, "/v1/fleet/activate-node", claim).status_code == 401


def test_an_old_signature_is_refused(endpoint: Endpoint) -> None:
    eve = load_node_key(endpoint.bundles["eve"].node_key)
    claim = ActivateNodeRequest(public_key=public_pem(eve), heartbeat_interval=30)
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=10)
    body = claim.SerializeToString()
    path = "/v1/fleet/activate-node"
    assert endpoint.post(path, signed(eve, path, body, old), body=body).status_code == 401
    garbled = signed(eve, path, body) | {FLEET_HTTP_SIGNATURE_HEADER: b64encode(b"0" * 70).decode()}
    assert endpoint.post(path, garbled, body=body).status_code == 401


def test_a_proxy_that_ends_tls_can_change_neither_body_nor_path_nor_time(endpoint: Endpoint) -> None:
    eve, path = endpoint.newcomer(), "/v1/fleet/send-node-heartbeat"
    node, key = Node(node_id=eve.activate()), endpoint.key_of(eve)
    body = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30).SerializeToString()
    other = SendNodeHeartbeatRequest(node=node, heartbeat_interval=86400).SerializeToString()
    good = signed(key, path, body)
    assert endpoint.post(path, good, body=body).status_code == 200
    later = signed(key, path, body, datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1))
    missing = {name: value for name, value in good.items() if name != SIGNATURE_HEADER}
    forged = [good | {SIGNATURE_HEADER: value} for value in ("", "AA", "#", later[SIGNATURE_HEADER])]
    for headers in (missing, *forged, good | {KEY_HEADER: "AA=="}):
        assert endpoint.post(path, headers, body=body).status_code == 401, headers
    assert endpoint.post(path, good, body=other).status_code == 401
    assert endpoint.post("/v1/fleet/deactivate-node", good, body=body).status_code == 401


def test_a_wrong_clock_is_corrected_by_the_servers(endpoint: Endpoint) -> None:
    device = endpoint.newcomer(ServerClock(lambda: time.time() + 3600.0))
    device.activate()
    assert abs(device.clock_error - 3600.0) < 2.0
    device.deactivate(device.node_id)


def test_a_revoked_device_is_cut_off_at_its_next_request(endpoint: Endpoint) -> None:
    device = endpoint.newcomer()
    node_id = device.activate()
    assert device.pull() is None
    endpoint.link.unregister(node_id)
    with pytest.raises(UnknownDeviceError, match="revoked"):
        device.pull()
    with pytest.raises(UnknownDeviceError):
        device.beat()
    with pytest.raises((NotAdmittedError, UnknownDeviceError)):
        device.activate()


def test_a_device_trusts_its_own_authority_only(endpoint: Endpoint) -> None:
    device = FleetLink(endpoint.public, make_authority().certificate, endpoint.bundles["ada"].node_key)
    endpoint.lines.append(device)
    with pytest.raises(UntrustedError, match="certificate"):
        device.activate()


def test_a_server_under_another_name_is_not_trusted(endpoint: Endpoint) -> None:
    device = FleetLink(f"127.1:{endpoint.listener.port}", endpoint.home.authority, endpoint.bundles["ada"].node_key)
    endpoint.lines.append(device)
    with pytest.raises(UntrustedError, match=r"certificate"):
        device.activate()


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
            device.activate()
        device.close()
        thread.join(5)
