"""A malicious server's answers to a device: none ends its process, fills its memory or redirects it."""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PullObjectResponse

from fedtune.core.errors import PeerError
from fedtune.core.manifest.joining import make_node_key
from fedtune.core.protocol.bundles import TAKE, Taken
from fedtune.core.protocol.messages import encode
from fedtune.flower.fleet_link import FleetLink, LinkLimits
from fedtune.flower.signed_http import UnreachableError
from fedtune.server.live.certificates import make_authority, make_server_certificate


@dataclass
class Liar:
    """A server that answers every call with the test's content.

    Args:
        narrow: a second link to it, which accepts a megabyte in one answer and three in one message.
    """

    link: FleetLink
    port: int
    narrow: FleetLink
    answers: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            made.asked.append(self.path)
            body = made.answers.get(self.path, b"")
            self.send_response(made.status)
            for name, value in {**made.headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    authority = make_authority()
    certificate = make_server_certificate(authority, ["localhost"])
    (tmp_path / "server.pem").write_bytes(certificate.certificate + certificate.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the device hangs up
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address, key = f"localhost:{server.server_port}", make_node_key()
    link = FleetLink(address, authority.certificate, key)
    limits = LinkLimits(answer_bytes=1 << 20, message_bytes=3 << 20)
    made = Liar(link, server.server_port, FleetLink(address, authority.certificate, key, None, limits))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    link.close()
    made.narrow.close()
    server.shutdown()
    server.server_close()
    thread.join()


def message(message_type: str = "train") -> Message:
    moment = time.time()
    proto = Message(
        metadata=Metadata(run_id=1, message_id="x", message_type=message_type, created_at=moment, ttl=100.0)
    )
    proto.content.SetInParent()
    return proto


def taken(messages: list[Message], trees: list[ObjectTree], objects: dict[str, bytes] | None = None) -> bytes:
    found = PullMessagesResponse(messages_list=messages, message_object_trees=trees)
    return encode(Taken(found.SerializeToString(), objects or {}))


@pytest.mark.parametrize(
    "answer",
    [
        taken([message()], []),
        taken([Message()], [ObjectTree()]),
        taken([message(message_type="../\x1b[2J")], [ObjectTree(object_id="a" * 64)]),
    ],
    ids=["no tree", "nothing", "a type that is none"],  # the bytes contain the time
)
def test_what_is_no_message_is_refused(liar: Liar, answer: bytes) -> None:
    liar.answers[TAKE] = answer
    with pytest.raises(PeerError, match="not a message"):
        liar.link.pull()


@pytest.mark.parametrize("content", [b"", b"\0", b"Message 3\0abc", b"Message x\0", b"Message 0\0", b"Nobody 1\0x"])
def test_objects_that_are_no_message_are_refused(liar: Liar, content: bytes) -> None:
    liar.answers[TAKE] = taken([message()], [ObjectTree(object_id="a" * 64)], {"a" * 64: content})
    task = liar.link.pull()
    assert task is not None
    with pytest.raises(PeerError, match="could not be fetched"):
        liar.link.fetch(task)


def test_an_answer_that_would_fill_the_memory_is_not_read_to_its_end(liar: Liar) -> None:
    liar.answers[TAKE] = bytes((1 << 20) + 1)
    with pytest.raises(PeerError, match="more than 1048576 bytes"):
        liar.narrow.pull()
    liar.answers[TAKE], liar.headers = gzip.compress(bytes(8 << 20)), {"content-encoding": "gzip"}
    with pytest.raises(PeerError, match="compressed"):
        liar.narrow.pull()


def test_nor_is_a_message_of_ever_more_pieces(liar: Liar) -> None:
    piece = PullObjectResponse(object_found=True, object_available=True, object_content=bytes(1_000_000))
    liar.answers["/v1/fleet/pull-object"] = piece.SerializeToString()
    tree = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id=f"{n:064x}") for n in range(50)])
    liar.answers[TAKE] = taken([message()], [tree])
    task = liar.narrow.pull()
    assert task is not None
    with pytest.raises(PeerError, match="the message has more than 3145728 bytes"):
        liar.narrow.fetch(task)
    assert liar.asked.count("/v1/fleet/pull-object") < 50


def test_a_server_sends_no_device_elsewhere(liar: Liar) -> None:
    liar.status, liar.headers = 307, {"location": f"https://localhost:{liar.port}/elsewhere"}
    with pytest.raises(UnreachableError, match="the server answered 307"):
        liar.link.pull()
    assert liar.asked == [TAKE]
