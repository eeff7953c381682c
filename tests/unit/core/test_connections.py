"""Connections without a request are closed after a time, and no request's head exceeds its limit."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import uvicorn

from fedtune.core.host.connections import MAX_HEAD_BYTES, Patience, _address, bounded_http

HEAD_SECONDS = 0.5
MOST_OPEN = 12
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def greet(scope: Any, receive: Any, send: Any) -> None:
    """Answers every request with two letters."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture(params=["asyncio", "uvloop"])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A server on the loop that an answering device has, or on the one that comes with Flower."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    config = uvicorn.Config(
        greet,
        loop=request.param,
        lifespan="off",
        log_level="critical",
        http=bounded_http(Patience(HEAD_SECONDS, HEAD_SECONDS, silent=3)),
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        limit_concurrency=MOST_OPEN,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join(10)


def answer(connection: socket.socket) -> bytes:
    """Returns a whole answer, or what comes before the connection ends."""
    received = b""
    while not received.endswith(b"hi") and (more := connection.recv(1000)):
        received += more
    return received


@pytest.mark.parametrize("begun", [b"", b"GET", REQUEST[:-1]])
def test_a_connection_without_a_whole_request_ends(address: tuple[str, int], begun: bytes) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as stranger:
        stranger.sendall(begun)
        assert stranger.recv(1) == b""


def test_silent_connections_of_one_address_shut_nobody_out(address: tuple[str, int]) -> None:
    with ExitStack() as crowd:
        silent = [crowd.enter_context(socket.create_connection(address, timeout=10)) for _ in range(2 * MOST_OPEN)]
        with socket.create_connection(address, timeout=10) as device:
            device.sendall(REQUEST)
            assert b"200 OK" in answer(device)
            assert silent[0].recv(1) == b""


def test_connections_that_have_asked_are_not_counted(address: tuple[str, int]) -> None:
    with ExitStack() as fleet:
        devices = [fleet.enter_context(socket.create_connection(address, timeout=10)) for _ in range(3)]
        for _ in range(2):
            for device in devices:
                device.sendall(REQUEST)
                assert b"200 OK" in answer(device)
            devices += [fleet.enter_context(socket.create_connection(address, timeout=10)) for _ in range(3)]


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_address_of_ipv6_counts_as_its_network(host: str, counted: str) -> None:
    assert _address((host, 1) if host else None) == counted


def test_so_does_one_that_sends_its_second_request_byte_by_byte(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as stranger:
        stranger.sendall(REQUEST)
        assert answer(stranger).endswith(b"hi")
        start = time.monotonic()
        with suppress(ConnectionError):
            while stranger.send(b"G") and time.monotonic() - start < 20 * HEAD_SECONDS:
                time.sleep(HEAD_SECONDS / 5)
        assert time.monotonic() - start < 10 * HEAD_SECONDS


def test_requests_on_one_connection_may_be_far_apart_and_bodies_slow(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as device:
        for _ in range(2):
            device.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n1")
            time.sleep(2 * HEAD_SECONDS)
            device.sendall(b"2")
            assert answer(device).endswith(b"hi")
            time.sleep(2 * HEAD_SECONDS)


def test_a_head_that_never_ends_is_cut_off(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as stranger:
        sent = 0
        stranger.sendall(b"GET / HTTP/1.1\r\na: ")
        with suppress(ConnectionError):
            while sent < 1000 * MAX_HEAD_BYTES:
                sent += stranger.send(b"x" * MAX_HEAD_BYTES)
        assert sent < 500 * MAX_HEAD_BYTES  # sockets buffer the rest
