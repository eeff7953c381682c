"""The reverse-proxy rules under a real proxy on loopback in front of a listening server."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from endpoint import Endpoint, listening
from flwr.app import Message
from live_helpers import free_port

from fedtune.client.live.fleet_link import Answer
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.guard import CONTROL_HEADER, DEVICE_CALLS
from fedtune.flower.run_grid import RunGrid

RULES = Path(__file__).parents[2] / "deploy" / "proxy"
NGINX = """
daemon off;
user {user};
error_log stderr;
pid {folder}/nginx.pid;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/fedtune.conf;
}}
"""


@dataclass(frozen=True)
class Proxy:
    """A running proxy and the server behind it."""

    port: int
    endpoint: Endpoint

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from listening(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(
    request: pytest.FixtureRequest, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """Runs each proxy with its rules unchanged except for names, ports and folders."""
    program = shutil.which(request.param, path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    if request.param == "nginx":
        rules = _rules(
            "nginx.conf", endpoint, {"listen 8443": f"listen 127.0.0.1:{port}", "fleet.example.org;": "localhost;"}
        )
        (folder / "fedtune.conf").write_text(rules)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, user=getpass.getuser()))
        command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
        subprocess.run([*command, "-t"], check=True, capture_output=True)
    else:
        names = {"https://fleet.example.org:8443 {": f"https://localhost:{port} {{\n\tbind 127.0.0.1"}
        (folder / "Caddyfile").write_text(_rules("Caddyfile", endpoint, names))
        arguments = ["--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
        subprocess.run([program, "validate", *arguments], check=True, capture_output=True)
        command = [program, "run", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield Proxy(port, endpoint)
    finally:
        process.terminate()
        process.wait(10)


def _rules(name: str, endpoint: Endpoint, replacements: dict[str, str]) -> str:
    text = (RULES / name).read_text()
    ours = {"127.0.0.1:8444": f"127.0.0.1:{endpoint.listener.port}", "/etc/fedtune": str(endpoint.home.path)}
    for there, here in {**replacements, **ours}.items():
        assert there in text
        text = text.replace(there, here)
    return text


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the proxy does not listen")


def test_a_device_works_through_the_proxy_with_payloads_of_megabytes(proxy: Proxy) -> None:
    device = proxy.endpoint.device("ada", proxy.address)
    device.connect()
    assert device.beat()
    payload = np.random.default_rng(0).bytes(3_000_000)
    with proxy.endpoint.link.open_run(60.0) as grid:
        grid.bound_replies("query.anything", len(payload))
        message_id = _ask(grid, proxy.endpoint.node(device), payload)
        task = device.take()
        assert task is not None
        assert device.fetch(task).parts == (payload,)
        device.answer(task, Answer(payload[::-1], 1.0))
        (reply,) = grid.pull_messages([message_id])
        assert unseal(reply) == payload[::-1]
    device.leave()


def _ask(grid: RunGrid, node: int, payload: bytes) -> str:
    (message_id,) = grid.push_messages([Message(seal(payload), node, "query.anything", ttl=600)])
    return message_id


def test_a_device_that_is_not_enrolled_is_refused_through_the_proxy_too(proxy: Proxy) -> None:
    assert proxy.endpoint.post("/v1/device/append", server=proxy.address).status_code == 401


@pytest.mark.parametrize(
    "path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/push-messages", "/docs", "/"]
)
def test_control_paths_do_not_exist_behind_the_proxy(proxy: Proxy, path: str) -> None:
    shown = {CONTROL_HEADER: proxy.endpoint.key, "x-forwarded-for": "127.0.0.1"}
    assert proxy.endpoint.post(path, shown, server=proxy.address).status_code == 404


TRICKS = [
    "/v1/device/../control/list-runs",
    "/v1/device/%2e%2e/control/list-runs",
    "/v1/device/%2e%2e%2fcontrol%2flist-runs",
    "/v1/device/take/../../control/list-runs",
    "/v1/control/../device/take",
    "/v1/device/ta%6be",
    "/v1/device/take?x=1",
    "/v1/device/take/",
    "//v1/device/take",
    "/V1/DEVICE/TAKE",
]


@pytest.mark.parametrize("target", TRICKS)
def test_paths_that_play_tricks_end_at_the_proxy(proxy: Proxy, target: str) -> None:
    assert _status(proxy, f"POST {target} HTTP/1.1", "content-length: 0") in (b"404", b"400")


@pytest.mark.parametrize("call", sorted(DEVICE_CALLS))
def test_every_call_of_a_device_is_passed_and_by_post_alone(proxy: Proxy, call: str) -> None:
    assert _status(proxy, f"POST {call} HTTP/1.1", "content-length: 0") not in (b"404", b"502")
    assert _status(proxy, f"GET {call} HTTP/1.1") == b"404"


def test_bodies_are_measured_at_the_proxy(proxy: Proxy) -> None:
    line = "POST /v1/device/append HTTP/1.1"
    assert _status(proxy, line) == b"411"
    chunked = "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0"
    assert _status(proxy, line, chunked) == b"411"
    assert _status(proxy, line, f"content-length: {(1 << 20) + 1}") == b"413"


def _status(proxy: Proxy, line: str, header: str = "accept: */*") -> bytes:
    head = f"{line}\r\nhost: localhost\r\nconnection: close\r\n{header}\r\n\r\n"
    return proxy.endpoint.raw(head.encode(), proxy.port).split()[1]
