"""A malicious server's answers to a device: none ends its process, fills its memory or redirects it."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedtune.client.live.fleet_link import Answer, FleetLink
from fedtune.client.live.signed_http import MAX_ANSWER_BYTES, UnreachableError
from fedtune.core.errors import PeerError
from fedtune.core.manifest.joining import make_node_key
from fedtune.core.protocol.device_calls import (
    ANNOUNCE,
    APPEND,
    MAX_PIECE_BYTES,
    READ_PART,
    TAKE,
    Assignment,
    Received,
    Taken,
)
from fedtune.core.protocol.messages import encode
from fedtune.server.live.certificates import make_authority, make_server_certificate

_CALLS = 200  # after which the server stops lying: a device that would ask without end fails its test instead


@dataclass
class Liar:
    """A server that answers every call with the test's content.

    Args:
        link: a link to it, which accepts three megabytes in a message.
    """

    link: FleetLink
    port: int
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
            self.send_response(made.status if len(made.asked) < _CALLS else 500)
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
    link = FleetLink(address, authority.certificate, key, message_bytes=3 << 20)
    made = Liar(link, server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    link.close()
    server.shutdown()
    server.server_close()
    thread.join()


def taken(parts: tuple[bytes, ...] = (b"question",), sizes: tuple[int, ...] = (), action: str = "train") -> bytes:
    return encode(Taken(Assignment("a" * 64, action, "1", parts, sizes)))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0",
        taken()[:-1],
        taken(action="../\x1b[2J"),
        taken((b"", b"", b"")),
        taken((), (-1,)),
        taken((), (1 << 40,)),
    ],
)
def test_what_is_no_message_is_refused(liar: Liar, answer: bytes) -> None:
    liar.answers[TAKE] = answer
    with pytest.raises(PeerError, match="Taken"):
        liar.link.take()


@pytest.mark.parametrize("answer", [taken(()), taken((b"", b"")), taken(action="query.open")])
def test_a_message_has_the_parts_of_its_action(liar: Liar, answer: bytes) -> None:
    liar.answers[TAKE] = answer
    task = liar.link.take()
    assert task is not None
    with pytest.raises(PeerError, match=r"expected [12]"):
        liar.link.fetch(task)


def test_an_answer_that_would_fill_the_memory_is_not_read_to_its_end(liar: Liar) -> None:
    liar.answers[TAKE] = bytes(MAX_ANSWER_BYTES + 1)
    with pytest.raises(PeerError, match=f"more than {MAX_ANSWER_BYTES} bytes"):
        liar.link.take()
    liar.answers[TAKE], liar.headers = gzip.compress(bytes(8 << 20)), {"content-encoding": "gzip"}
    with pytest.raises(PeerError, match="compressed"):
        liar.link.take()


def test_nor_is_a_message_of_ever_more_pieces(liar: Liar) -> None:
    liar.answers[TAKE] = taken((), (2 << 20, 2 << 20))
    task = liar.link.take()
    assert task is not None
    with pytest.raises(PeerError, match="the message has more than 3145728 bytes"):
        liar.link.fetch(task)
    assert READ_PART not in liar.asked


@pytest.mark.parametrize("size", [0, 1001, MAX_PIECE_BYTES + 1])
def test_a_piece_is_a_part_of_what_was_announced(liar: Liar, size: int) -> None:
    liar.answers[TAKE], liar.answers[READ_PART] = taken((), (1000,)), bytes(size)
    task = liar.link.take()
    assert task is not None
    with pytest.raises(PeerError, match=f"a piece of {size} bytes, where 1000 are missing"):
        liar.link.fetch(task)


@pytest.mark.parametrize("there", [0, 100])
def test_a_server_that_takes_no_piece_of_an_answer_keeps_no_device_busy(liar: Liar, there: int) -> None:
    liar.answers = {TAKE: taken(), ANNOUNCE: encode(Received(100)), APPEND: encode(Received(there))}
    task = liar.link.take()
    assert task is not None
    with pytest.raises(UnreachableError, match="does not take the next piece"):
        liar.link.answer(task, Answer(bytes(200_000), 0.0))
    assert liar.asked.count(APPEND) == 1


def test_a_server_sends_no_device_elsewhere(liar: Liar) -> None:
    liar.status, liar.headers = 307, {"location": f"https://localhost:{liar.port}/elsewhere"}
    with pytest.raises(UnreachableError, match="the server answered 307"):
        liar.link.take()
    assert liar.asked == [TAKE]
