"""A listening server without jobs, for tests of its sockets; it loads no model, so it starts in seconds."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from owner import Enrolled, enroll, make_server

from fedtune.client.live.fleet_link import FleetLink
from fedtune.core.host.trusted_server import ServerClock
from fedtune.core.manifest.joining import load_node_key
from fedtune.flower.superlink import Link
from fedtune.server.live.enrolled_devices import Devices
from fedtune.server.live.server_home import ServerConfig, ServerHome
from fedtune.server.live.sockets import Listener


@dataclass
class Endpoint:
    """A listening server as in production, and the keys of two devices."""

    home: ServerHome
    listener: Listener
    link: Link
    key: str
    bundles: dict[str, Enrolled]
    reports: list[str]
    lines: list[FleetLink] = field(default_factory=list)
    node_keys: dict[bytes, str] = field(default_factory=dict)

    def newcomer(self, clock: ServerClock | None = None) -> FleetLink:
        """Enrols a new device and returns its link."""
        name = f"newcomer-{len(self.lines)}"
        node_key = enroll(self.home, name).node_key
        link = FleetLink(self.public, self.home.authority, node_key, clock)
        self.lines.append(link)
        self.node_keys[link.public_key] = node_key
        self.link.register(name, link.public_key)
        return link

    def key_of(self, newcomer: FleetLink) -> EllipticCurvePrivateKey:
        """Returns the private key for the device's requests."""
        return load_node_key(self.node_keys[newcomer.public_key])

    def node(self, newcomer: FleetLink) -> int:
        """Returns the number under which the server knows a connected device."""
        (node,) = [node.node_id for node in self.link.nodes() if node.public_key == newcomer.public_key]
        return node

    @property
    def public(self) -> str:
        return f"localhost:{self.listener.port}"

    @property
    def private(self) -> str:
        return f"localhost:{self.listener.private_port}"

    def device(self, name: str, server: str | None = None) -> FleetLink:
        bundle = self.bundles[name]
        link = FleetLink(server or self.public, bundle.authority.encode(), bundle.node_key)
        self.lines.append(link)
        return link

    def post(
        self, path: str, headers: Mapping[str, str] | None = None, *, server: str | None = None, body: bytes = b""
    ) -> httpx.Response:
        context = ssl.create_default_context(cadata=self.home.authority.decode())
        with httpx.Client(verify=context) as client:
            url = f"https://{server or self.public}{path}"
            return client.post(url, content=body, headers=headers or {})

    def raw(self, request: bytes, port: int | None = None) -> bytes:
        """Returns the server's answer to exactly these bytes."""
        context = ssl.create_default_context(cadata=self.home.authority.decode())
        with (
            socket.create_connection(("127.0.0.1", port or self.listener.port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as line,
        ):
            line.sendall(request)
            answer = b""
            with suppress(OSError):
                while data := line.recv(65536):
                    answer += data
            return answer


def listening(folder: Path, hosts: list[str] | None = None) -> Iterator[Endpoint]:
    home = make_server(folder / "server", ServerConfig("localhost:8443", "127.0.0.1", 0), hosts)
    bundles = {name: enroll(home, name) for name in ("ada", "bob", "eve")}
    reports: list[str] = []
    with Listener(home) as listener:
        key = listener.start()
        link = listener.link(key, reports.append)
        link.wait_until_ready()
        for name, public_key in Devices.load(home).node_keys.items():
            link.register(name, public_key)
        listener.open()
        endpoint = Endpoint(home, listener, link, key, bundles, reports)
        yield endpoint
        for line in endpoint.lines:
            line.close()
        link.close()
