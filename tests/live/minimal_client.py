"""A device of a fleet in one file, written from docs/wire-protocol.md alone, with nothing of fedtune in it.

    python minimal_client.py INVITATION NAME ROUNDS

It joins, waits for the owner's approval, registers for jobs in the clear, answers `train` with an update of zeros as
often as ROUNDS says, and leaves. Everything else it refuses.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import http.client
import json
import ssl
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import msgpack

VERSION, PIECE, LONGEST = 4, 131_072, 135_168
EXACT = 1


def framed(label: str, *parts: bytes) -> bytes:
    return b"".join(
        struct.pack(">Q", len(each)) + each for each in (b"fedtune secure aggregation 1", label.encode(), *parts)
    )


def checked(line: bytes, kind: str, key: bytes) -> dict[str, Any]:
    """Returns the content of an owner's statement, if its signature is the key's."""
    statement = json.loads(line)
    assert statement["kind"] == kind
    text = json.dumps(statement["content"], sort_keys=True).encode()
    signature = bytes.fromhex(statement["signature"])
    Ed25519PublicKey.from_public_bytes(key).verify(
        signature, framed("statement of a fleet's owner", kind.encode(), text)
    )
    content: dict[str, Any] = statement["content"]
    return content


class Device:
    def __init__(self, invitation: dict[str, str], name: str) -> None:
        self.name, self.log, self.rounds = name, b"", 0
        self.first_key = bytes.fromhex(invitation["fleet_key"])
        self.identity, self.node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
        self.host, _, port = invitation["server"].rpartition(":")
        self.port = int(port)
        self.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.trust.load_verify_locations(cadata=invitation["authority"])

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        line = http.client.HTTPSConnection(self.host, self.port, timeout=20, context=self.trust)
        try:
            line.request("POST", path, body, {**headers, "content-length": str(len(body))})
            answer = line.getresponse()
            return answer.status, answer.read(LONGEST)
        finally:
            line.close()

    def call(self, path: str, *message: Any) -> Any:
        body = msgpack.encode(message) if message else b""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        signature = self.node.sign(
            framed("fleet request", path.encode(), now.encode(), body), ec.ECDSA(hashes.SHA256())
        )
        pem = self.node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        status, answer = self.post(
            path,
            body,
            {
                "fedtune-key": base64.b64encode(pem).decode(),
                "fedtune-time": now,
                "fedtune-signature": base64.b64encode(signature).decode(),
            },
        )
        if status != 200:
            raise ConnectionError(f"{path}: {status}")
        return answer if path.endswith("/read") or not answer else msgpack.decode(answer)

    def join(self) -> None:
        identity = self.identity.public_key().public_bytes_raw()
        node = self.node.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        keys = self.name.encode(), identity, node
        request = {
            "format": "fedtune-join-request-1",
            "name": self.name,
            "identity": identity.hex(),
            "node": node.hex(),
            "signature": self.identity.sign(framed("device joins", *keys)).hex(),
        }
        patiently(lambda: self.post("/v1/device/join", json.dumps(request).encode(), {})[0] == 200)
        code = base64.b32encode(hashlib.sha256(framed("join request", *keys)).digest()).decode()[:16]
        print("-".join(code[start : start + 4] for start in range(0, 16, 4)), flush=True)

    def serve(self, rounds: int) -> None:
        patiently(lambda: self.call("/v1/device/connect") == b"")
        beat = time.monotonic()
        while self.rounds < rounds:
            if time.monotonic() - beat > 10:
                self.call("/v1/device/beat")
                beat = time.monotonic()
            _, assignment = self.call("/v1/device/take")
            if assignment is None:
                time.sleep(0.2)
                continue
            _, message, action, _, parts, sizes = assignment
            parts = parts or [self.read(message, part, size) for part, size in enumerate(sizes)]
            try:
                self.bring(message, self.answer(action, msgpack.decode(parts[0])))
            except ValueError as error:
                self.call("/v1/device/bring", "BringAnswer", message, 0.0, b"", ["Refused", str(error), False])
        self.call("/v1/device/leave")

    def read(self, message: str, part: int, size: int) -> bytes:
        content = b""
        while len(content) < size:
            content += self.call("/v1/device/read", "ReadPart", message, part, len(content))
        return content

    def bring(self, message: str, payload: bytes) -> None:
        if len(payload) <= PIECE:
            self.call("/v1/device/bring", "BringAnswer", message, 0.5, payload, None)
            return
        digest = hashlib.sha256(payload).digest()
        _, there = self.call("/v1/device/announce", "AnnounceAnswer", message, 0.5, len(payload), digest)
        while there < len(payload):
            piece = payload[there : there + PIECE]
            _, there = self.call("/v1/device/append", "AppendPiece", message, there, piece)

    def answer(self, action: str, request: list[Any]) -> bytes:
        if action == "query.registration":
            return self.register(*request[1:])
        if action == "train":
            return self.train(request)
        raise ValueError(f"this device does not answer {action}")

    def register(self, version: int, software: str, manifest: bytes, log: bytes) -> bytes:
        if version != VERSION:
            raise ValueError(f"version {version}; this device speaks {VERSION}")
        key, number = self.follow(log)
        content = checked(manifest, "job manifest", key)
        if content["expires"] < time.time():
            raise ValueError("the manifest has expired")
        length = content["base"]["sequence_length"]
        print(f"registered for {content['name']} of {software}", flush=True)
        reply = "RegistrationReply", VERSION, "minimal", number, 1, 8000, "", "", content["base"]["rank"]
        return msgpack.encode([*reply, "packed", length, 1, 1.0])

    def follow(self, log: bytes) -> tuple[bytes, int]:
        """Takes a fleet's log; returns the owner's key that is in force after it, and the number of its last entry."""
        assert log.startswith(self.log)
        key, before, listed, number, expires = self.first_key, "", set[str](), 0, 0.0
        for line in log.splitlines(keepends=True):
            entry = checked(line, "fleet entry", key)
            assert (entry["number"], entry["previous"]) == (number + 1, before)
            number, expires, before = number + 1, entry["expires"], hashlib.sha256(line).hexdigest()
            listed = (listed - set(entry["revoked"])) | set(entry["approved"])
            key = bytes.fromhex(entry["next_key"]) or key
        if self.name not in listed or expires < time.time():
            raise ValueError("the fleet's log has expired, or does not list this device")
        self.log = log
        return key, number

    def train(self, request: list[Any]) -> bytes:
        _, _, _, number, _, _, uplink, adapter, _, _ = request
        if uplink[1] != "exact":
            raise ValueError(f"this device cannot write updates of the form {uplink[1]}")
        updates = []
        for part in adapter[3]:
            (count,) = struct.unpack_from("<I", part, 4)
            updates.append(frame(count, bytes(4 * count)))
        self.rounds += 1
        return msgpack.encode(["TrainReply", number, 1, 8, 1, 1.0, 0.5, updates])


def patiently(step: Callable[[], bool]) -> None:
    """Repeats a step until it succeeds: the server may not run yet, or not know the device."""
    while True:
        try:
            if step():
                return
        except OSError:
            pass
        time.sleep(0.2)


def frame(count: int, body: bytes) -> bytes:
    head = b"fu" + struct.pack("<BBII", 3, EXACT, count, len(body))
    return head + struct.pack("<I", zlib.crc32(head + body)) + body


def main() -> None:
    invitation, name, rounds = sys.argv[1:]
    device = Device(json.loads(Path(invitation).read_text()), name)
    device.join()
    device.serve(int(rounds))


if __name__ == "__main__":
    main()
