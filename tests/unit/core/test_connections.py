"""Connections without a request are closed after a time, and no request's head exceeds its limit."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvicorn

from fedtune.core.host.connections import MAX_HEAD_BYTES, BoundedHttp

HEAD_SECONDS = 0.5
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def greet(scope: Any, receive: Any, send: Any) -> None:
    """Answers every request with two letters."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


class Impatient(BoundedHttp):
    """Waits for the head of a request as long as a test may take."""

    head_seconds = HEAD_SECONDS


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(
        greet,
        lifespan="off",
        log_level="critical",
        http=Impatient,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("begun", [b"", b"GET", REQUEST[:-1]])
def test_a_connection_without_a_whole_request_ends(address: tuple[str, int], begun: bytes) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as stranger:
        stranger.sendall(begun)
        assert stranger.recv(1) == b""


def test_so_does_one_that_sends_its_second_request_byte_by_byte(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as stranger:
        stranger.sendall(REQUEST)
        assert stranger.recv(1000).endswith(b"hi")
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
            assert device.recv(1000).endswith(b"hi")
            time.sleep(2 * HEAD_SECONDS)


def test_a_head_that_never_ends_is_cut_off(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20 * HEAD_SECONDS) as stranger:
        sent = 0
        stranger.sendall(b"GET / HTTP/1.1\r\na: ")
        with suppress(ConnectionError):
            while sent < 1000 * MAX_HEAD_BYTES:
                sent += stranger.send(b"x" * MAX_HEAD_BYTES)
        assert sent < 500 * MAX_HEAD_BYTES  # sockets buffer the rest
