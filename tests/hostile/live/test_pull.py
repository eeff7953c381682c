"""Pulling a model over TLS: broken links, malicious servers, unauthenticated clients; no partial version counts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoint import Endpoint, listening
from live_helpers import Proxy, free_port
from owner import Enrolled, enroll, owner_of, revoke

from fedtune.client.inference.model_line import PAUSES, ModelLine, PatientLine
from fedtune.client.inference.model_pull import Progress, Pulled
from fedtune.client.inference.model_pull import pull as pull_released
from fedtune.client.inference.model_versions import Versions
from fedtune.client.live.signed_http import SignedHttp, UnknownDeviceError
from fedtune.core.errors import InputError, PeerError, RunError
from fedtune.core.host.trusted_server import ServerClock
from fedtune.core.manifest.fleet_log import replay
from fedtune.core.manifest.joining import load_node_key, make_node_key
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.messages import PROTOCOL_VERSION, encode
from fedtune.core.protocol.model_manifest import MANIFEST, PACK_FORMAT, PACK_KIND, Manifest, list_files, verify
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_DESCRIPTION_BYTES,
    MAX_PIECE_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
)
from fedtune.core.protocol.signed_requests import KEY_HEADER, MAX_AGE_SECONDS, MAX_AHEAD_SECONDS, TIME_HEADER, sign
from fedtune.core.secagg.identity import Identity
from fedtune.server.fleet.releasing import release_model
from fedtune.server.live.certificates import make_authority, make_server_certificate
from fedtune.server.live.model_registry import ModelRegistry

BIG = 3_000_000
OWNER = Identity(b"\x01" * 32)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from listening(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture
def offered(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Gives the endpoint with one finished job that has int4 and fp32."""
    offer(endpoint, "first", "fp32", 2 * BIG)
    offer(endpoint, "first", "int4", BIG)
    finish(endpoint, "first", 1)
    yield endpoint
    for folder in ("runs", "jobs/finished", "packs"):
        for path in (endpoint.home.path / folder).glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def offer(endpoint: Endpoint, job: str, form: str, size: int, seed: int = 0, kind: str = "model") -> Path:
    """Writes an exported directory of a run, which is not a model but is pulled like one."""
    return fill(endpoint.home.path / "runs" / job / "onnx" / form, job, form, size, seed, kind)


def offer_pack(endpoint: Endpoint, name: str, size: int = 10, seed: int = 0, kind: str = PACK_KIND) -> Path:
    """Writes an edge pack, which is none but is pulled like one, and has the owner release it."""
    folder = endpoint.home.path / "packs" / name
    shutil.rmtree(folder / PACK_FORMAT, ignore_errors=True)
    fill(folder / PACK_FORMAT, name, PACK_FORMAT, size, seed, kind)
    made = release_model(owner_of(endpoint.home), folder)
    ModelRegistry(endpoint.home).take(made.data)
    return folder


def fill(directory: Path, job: str, form: str, size: int, seed: int, kind: str) -> Path:
    (directory / "deep").mkdir(parents=True)
    (directory / "model.onnx.data").write_bytes(bytes([seed]) * size)
    (directory / "deep" / "tokenizer.json").write_bytes(b"{}" * 50_000)
    (directory / "empty").touch()
    manifest = Manifest(kind, job, form, {"seed": seed}, list_files(directory))
    (directory / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return directory


def finish(endpoint: Endpoint, job: str, number: int) -> None:
    folder = endpoint.home.path / "jobs" / "finished"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:06d}-{job}.toml").touch()
    release(endpoint, job)


def release(endpoint: Endpoint, job: str) -> ModelRelease:
    """Has the owner release a finished job's model, and the server offer it."""
    made = release_model(owner_of(endpoint.home), endpoint.home.path / "runs" / job / "onnx")
    return ModelRegistry(endpoint.home).take(made.data)


class Line(ModelLine):
    """A device's link, and the fleet key that the device pins."""

    fleet_key = OWNER.public

    def __init__(self, server: str, authority: bytes, node_key: str, clock: ServerClock | None = None) -> None:
        self.http = SignedHttp(server, authority, node_key, clock or ServerClock())
        super().__init__(self.http)

    def close(self) -> None:
        self.http.close()


def line_of(bundle: Enrolled, server: str, clock: ServerClock | None = None) -> Line:
    line = Line(server, bundle.authority.encode(), bundle.node_key, clock)
    line.fleet_key = bundle.fleet_key
    return line


def pull(
    line: Line | Liar | Passing,
    versions: Versions,
    job: str | None = None,
    form: str | None = None,
    progress: Progress | None = None,
    pauses: Sequence[float] = PAUSES,
) -> Pulled:
    def key_after(log: bytes) -> bytes:
        return replay(log, line.fleet_key).key

    return pull_released(PatientLine(line, pauses), versions, key_after, job, form, progress)


@pytest.fixture
def line(offered: Endpoint) -> Iterator[Line]:
    line = line_of(offered.bundles["ada"], offered.public)
    yield line
    line.close()


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "models")


def names(versions: Versions) -> list[str]:
    return sorted(path.name for path in versions.folder.iterdir() if path.is_dir() and not path.is_symlink())


def test_the_newest_release_is_pulled_in_its_smallest_format(offered: Endpoint, line: Line, versions: Versions) -> None:
    shown: list[tuple[int, int]] = []
    pulled = pull(line, versions, progress=lambda done, total: shown.append((done, total)))
    assert pulled.path.name.startswith("first-int4-")
    assert verify(pulled.path) == pulled.manifest
    assert (pulled.received, shown[-1]) == (pulled.total, (pulled.total, pulled.total))
    assert versions.current == pulled.path
    assert versions.previous is None
    assert pull(line, versions).received == 0  # the device has it already
    assert pull(line, versions, "first", "fp32").path.name.startswith("first-fp32-")
    # A job that is still running is not offered.
    offer(offered, "second", "int4", 10)
    assert pull(line, versions).path == pulled.path


def test_what_is_not_there_is_refused_with_what_is(line: Line, versions: Versions, offered: Endpoint) -> None:
    offer(offered, "running", "int4", 10)
    for job, form, words in (
        ("none", None, "job none: no model is released; jobs with one: first"),
        ("running", None, "job running: no model is released"),
        ("first", "int8", "job first was not released as int8; it was as int4, fp32"),
        ("first", "int3", "--format int3: unknown; expected one of int4, int8, fp16, fp32, edge"),
        ("first", PACK_FORMAT, "first: no edge pack of this name is released; packs: none yet"),
    ):
        with pytest.raises(InputError, match=words):
            pull(line, versions, job, form)
    with pytest.raises(PeerError, match="400"):
        pull(line, versions, "../first")
    assert versions.current is None


def test_a_pack_is_pulled_by_its_name_and_counts_by_itself(offered: Endpoint, line: Line, tmp_path: Path) -> None:
    offer_pack(offered, "small", BIG)
    offer_pack(offered, "wide")
    finish(offered, "first", 1)  # the model is released after the packs
    small, wide, models = (Versions(tmp_path / name) for name in ("small", "wide", "models"))
    pulled = pull(line, wide, "wide", PACK_FORMAT)
    assert pulled.path.name.startswith("wide-edge-")
    assert pulled.manifest.kind == PACK_KIND
    assert pull(line, models).path.name.startswith("first-int4-")
    first = pull(line, small, "small", PACK_FORMAT)
    assert first.received == first.total
    for job, words in (("first", "small, wide|wide, small"), ("other", "no edge pack of this name")):
        with pytest.raises(InputError, match=words):
            pull(line, small, job, PACK_FORMAT)
    offer_pack(offered, "small", BIG, seed=1)
    second = pull(line, small, "small", PACK_FORMAT)
    assert (small.current, small.previous) == (second.path, first.path)


def test_a_pack_from_before_the_one_that_is_here_is_refused(offered: Endpoint, line: Line, versions: Versions) -> None:
    folder = offer_pack(offered, "small")
    old = (folder / "release.json").read_bytes()
    offer_pack(offered, "small")
    pull(line, versions, "small", PACK_FORMAT)
    (folder / "release.json").write_bytes(old)
    with pytest.raises(PeerError, match="this device has installed release"):
        pull(line, versions, "small", PACK_FORMAT)
    offer_pack(offered, "small")
    with pytest.raises(InputError, match="does not come after"):
        ModelRegistry(offered.home).take(old)


def test_the_release_of_a_pack_is_taken_after_a_later_one_of_another_pack(offered: Endpoint) -> None:
    offer_pack(offered, "small")
    signed = release_model(owner_of(offered.home), offered.home.path / "packs" / "small")
    offer_pack(offered, "wide")
    assert ModelRegistry(offered.home).take(signed.data) == signed


def test_a_model_is_no_pack_and_a_pack_no_model(offered: Endpoint, line: Line, versions: Versions) -> None:
    offer_pack(offered, "small", kind="model")
    with pytest.raises(PeerError, match="model in edge; expected edge-pack in edge"):
        pull(line, versions, "small", PACK_FORMAT)
    shutil.rmtree(offered.home.path / "runs" / "first" / "onnx")
    offer(offered, "first", "int4", 10, kind=PACK_KIND)
    release(offered, "first")
    with pytest.raises(PeerError, match="edge-pack in int4; expected model in int4"):
        pull(line, versions, "first")
    assert versions.current is None


def test_the_version_before_stays_for_a_rollback_and_the_one_before_it_goes(
    offered: Endpoint, line: Line, versions: Versions
) -> None:
    with pytest.raises(InputError, match="no previous version"):
        versions.roll_back()
    first = pull(line, versions).path
    for number in (2, 3):
        offer(offered, f"job-{number}", "int4", BIG, number)
        finish(offered, f"job-{number}", number)
        newest = pull(line, versions)
        # The tokenizer is the same: only the weights travel.
        assert newest.received == BIG
    before, now = versions.previous, versions.current
    assert before is not None
    assert now is not None
    assert names(versions) == [before.name, now.name]
    assert (before.name[:6], now.name[:6], first.exists()) == ("job-2-", "job-3-", False)
    assert versions.roll_back() == before
    assert (versions.current, versions.previous) == (before, now)
    assert versions.roll_back() == now


@dataclass(frozen=True)
class Passing:
    """A link that passes everything on to another."""

    line: Line

    @property
    def fleet_key(self) -> bytes:
        return self.line.fleet_key

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        return self.line.describe(job, form)

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        return self.line.read(wanted)


def test_a_pull_that_was_broken_off_goes_on_where_it_was(line: Line, versions: Versions) -> None:
    class Killed(BaseException):
        pass

    class Dying(Passing):
        def read(self, wanted: ReadModel) -> Iterator[bytes]:
            for chunk in self.line.read(wanted):
                if wanted.file.endswith("data") and wanted.offset >= BIG // 2:
                    raise Killed
                yield chunk

    with pytest.raises(Killed):
        pull(Dying(line), versions)
    assert versions.current is None
    (incoming,) = versions.folder.glob(".incoming-*")
    assert not (incoming / MANIFEST).exists()  # without a manifest it is not an export
    half = (incoming / "model.onnx.data").stat().st_size
    assert BIG // 2 <= half < BIG
    (incoming / ".fedtune.json.abcd").touch()  # left by a crash while the manifest was written
    pulled = pull(line, versions)
    assert pulled.received == BIG - half
    assert names(versions) == [pulled.path.name]


def test_a_line_that_breaks_again_and_again_delays_a_pull_and_no_more(offered: Endpoint, versions: Versions) -> None:
    proxy = Proxy()
    proxy.target = offered.listener.port
    proxy.bytes_per_second = 6e6
    stop = threading.Event()

    def cutting() -> None:
        while not stop.wait(0.25):
            proxy.cut()
            time.sleep(0.05)
            proxy.mend()

    line = line_of(offered.bundles["ada"], f"localhost:{proxy.port}")
    cutter = threading.Thread(target=cutting)
    cutter.start()
    try:
        pulled = pull(line, versions, pauses=(0.05,) * 40)
        assert pulled.received == pulled.total
    finally:
        stop.set()
        cutter.join()
        line.close()
        proxy.close()


def test_a_server_that_stays_away_ends_a_pull_with_advice(versions: Versions) -> None:
    line = Line(f"localhost:{free_port()}", make_authority().certificate, make_node_key())
    with pytest.raises(RunError, match=r"cannot be reached.*go on with: fedtune client pull"):
        pull(line, versions, pauses=(0.01, 0.01))
    line.close()


@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_that_unpacks_to_more_than_it_is_on_the_wire_is_refused(
    versions: Versions, tmp_path: Path, status: int
) -> None:
    bomb = gzip.compress(gzip.compress(bytes(100 << 20)))

    class Bomb(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-encoding", "gzip, gzip")
            self.send_header("content-length", str(len(bomb)))
            self.end_headers()
            self.wfile.write(bomb)

    authority = make_authority()
    certificate = make_server_certificate(authority, ["localhost"])
    (tmp_path / "pem").write_bytes(certificate.certificate + certificate.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    with HTTPServer(("127.0.0.1", 0), Bomb) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = Line(f"localhost:{server.server_port}", authority.certificate, make_node_key())
        with pytest.raises(PeerError, match=r"answer is compressed \('gzip, gzip'\)"):
            pull(line, versions, pauses=())
        line.close()
        server.shutdown()


def test_only_enrolled_devices_may_ask(offered: Endpoint, versions: Versions, tmp_path: Path) -> None:
    line = line_of(replace(offered.bundles["ada"], node_key=make_node_key()), offered.public)
    with pytest.raises(UnknownDeviceError, match="does not know this device"):
        pull(line, versions)
    line.close()
    late = enroll(offered.home, "late")
    line = line_of(late, offered.public)
    assert pull(line, versions).received
    revoke(offered.home, "late")
    with pytest.raises(UnknownDeviceError, match="it was revoked"):
        pull(line, versions)
    line.close()


def test_a_signature_is_good_for_one_request_and_some_minutes(offered: Endpoint) -> None:
    body, key = encode(DescribeModel(PROTOCOL_VERSION)), load_node_key(offered.bundles["ada"].node_key)
    headers = sign(key, DESCRIBE, time.time(), body)
    assert offered.post(DESCRIBE, headers, body=body).status_code == 200
    assert offered.post(READ, headers, body=body).status_code == 401
    assert offered.post(DESCRIBE, headers, body=encode(DescribeModel(PROTOCOL_VERSION, "first"))).status_code == 401
    for seconds in (-MAX_AGE_SECONDS - 1, MAX_AHEAD_SECONDS + 30):
        moved = sign(key, DESCRIBE, time.time() + seconds, body)
        assert offered.post(DESCRIBE, moved, body=body).status_code == 401
    bob = sign(load_node_key(offered.bundles["bob"].node_key), DESCRIBE, time.time(), body)
    for other in ({KEY_HEADER: bob[KEY_HEADER]}, {TIME_HEADER: bob[TIME_HEADER]}, {TIME_HEADER: "9" * 300}):
        assert offered.post(DESCRIBE, {**headers, **other}, body=body).status_code == 401
    assert offered.post(DESCRIBE, headers, body=b"x" * 20_000).status_code == 413


def test_a_device_whose_clock_is_wrong_pulls_all_the_same(offered: Endpoint, versions: Versions) -> None:
    clock = ServerClock(lambda: time.time() - 86_400)
    line = line_of(offered.bundles["ada"], offered.public, clock)
    assert pull(line, versions).received > BIG
    assert clock.ahead == pytest.approx(-86_400, abs=2.0)
    line.close()


def test_a_device_reads_nothing_but_what_a_manifest_lists(offered: Endpoint, line: Line) -> None:
    described = line.describe(None, None)
    digest = hashlib.sha256(described.manifest).hexdigest()

    def read(file: str, **changes: Any) -> bytes:
        fields: dict[str, Any] = {"job": "first", "format": "int4", "manifest": digest, "offset": 0, "size": 1000}
        fields |= changes
        return b"".join(line.read(ReadModel(version=PROTOCOL_VERSION, file=file, **fields)))

    assert read("deep/tokenizer.json") == b"{}" * 500
    for file in ("../../../../../fleet.key", "/etc/passwd", MANIFEST, "deep", "deep/../deep/tokenizer.json", "\0"):
        with pytest.raises(InputError, match="no such file in first, int4"):
            read(file)
    for changes in ({"job": "../../server"}, {"format": "../.."}, {"size": MAX_PIECE_BYTES + 1}, {"offset": -1}):
        with pytest.raises(PeerError, match="400"):
            read("deep/tokenizer.json", **changes)
    with pytest.raises(PeerError, match="got the offset"):
        read("empty")
    with pytest.raises(InputError, match="exported again"):
        read("deep/tokenizer.json", manifest="0" * 64)


class Liar:
    """A server that claims and sends anything; its release is the owner's own, of whatever the manifest says."""

    fleet_key = OWNER.public

    def __init__(self, manifest: Any, content: bytes = b"", job: str = "first") -> None:
        self.manifest = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        self.content = content
        models = {"int4": hashlib.sha256(self.manifest).hexdigest()}
        self.released = ModelRelease.sign(OWNER, 1, job, models, time.time() + 86_400).data

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        return ModelDescription(PROTOCOL_VERSION, "int4", self.manifest, self.released, b"")

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        yield self.content[wanted.offset : wanted.offset + wanted.size]


def manifest_of(files: dict[str, int], **changes: Any) -> dict[str, Any]:
    entries = {name: {"sha256": "0" * 64, "bytes": size} for name, size in files.items()}
    manifest = Manifest("model", "first", "int4", {}, {}).to_json()
    return manifest | {"files": entries} | changes


@pytest.mark.parametrize(
    "name", ["../escape", "/tmp/escape", "a/../../escape", "a\\b", "", ".", "a//b", "fedtune.json", "a\0b", "a\nb"]
)
def test_a_name_that_leads_outside_is_refused(versions: Versions, name: str) -> None:
    with pytest.raises(PeerError, match="not a manifest"):
        pull(Liar(manifest_of({name: 1}), b"x"), versions)
    assert not list(versions.folder.glob(".incoming*"))


@pytest.mark.parametrize(
    ("liar", "words"),
    [
        (Liar(b"\xff"), "not a manifest"),
        (Liar(b"[" * 100_000), "not a manifest"),
        (Liar(manifest_of({"a": 1}, kind="adapter")), "expected model in int4"),
        (Liar(manifest_of({"a": 1}, format="fp32")), "expected model in int4"),
        (Liar(manifest_of({"a": 1}, name="\x1b[2J")), "printable text"),
        (Liar(manifest_of({"a": 1}, start_tokens=[float("inf")])), "not a manifest"),
        (Liar(manifest_of({f"{n}": 0 for n in range(5000)})), "5000 files"),
        (Liar(manifest_of({"a": 1}), b"x", job="second"), "which was not requested"),
        (Liar(manifest_of({"a": 5}), b"other"), "a: what arrived has SHA-256"),
    ],
)
def test_lies_of_a_server_lead_to_no_version(versions: Versions, liar: Liar, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        pull(liar, versions, "first", "int4")
    assert versions.current is None
    assert not [path for path in versions.folder.rglob("*") if path.name in (MANIFEST, "a")]


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_it_travels(versions: Versions) -> None:
    with pytest.raises(RunError, match="bytes are to come, and"):
        pull(Liar(manifest_of({"a": 1 << 50})), versions)
    impossible = manifest_of({"a": 1, "a/b": 1})  # a file that is a folder too
    impossible["files"]["a"]["sha256"] = hashlib.sha256(b"x").hexdigest()
    with pytest.raises(RunError, match="File exists; the current model is as it was"):
        pull(Liar(impossible, b"x"), versions)
    assert versions.current is None


@pytest.mark.parametrize("kilobytes", [200, 1500, 3100])
def test_a_disk_that_fills_up_leaves_the_current_version_and_the_bytes_that_fitted(
    offered: Endpoint,
    line: Line,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    kilobytes: int,
) -> None:
    disk = small_disk(kilobytes)
    versions = Versions(disk / "models")
    offer(offered, "small", "int4", 10)
    finish(offered, "small", 2)
    before = pull(line, versions, "small").path
    release(offered, "first")
    (disk / "others").write_bytes(b"x" * 20_000)
    unforeseen = shutil.disk_usage(disk)._replace(free=1 << 40)  # another process fills the disk during the transfer
    monkeypatch.setattr(shutil, "disk_usage", lambda path: unforeseen)
    with pytest.raises(RunError, match="the disk is full; the current model is as it was"):
        pull(line, versions, "first")
    assert (versions.current, names(versions)[0][:9]) == (before, ".incoming")
    assert not list(versions.folder.glob(".incoming*/fedtune.json"))
    verify(before)


def test_a_server_that_sends_more_than_was_asked_for_is_cut_off(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    described = line.describe(None, None)
    digest = hashlib.sha256(described.manifest).hexdigest()
    wanted = ReadModel(PROTOCOL_VERSION, "first", "int4", digest, "model.onnx.data", 0, 1000)
    honest, shown = httpx.Response.iter_raw, 0

    def ever_more(response: httpx.Response, size: int | None = None) -> Iterator[bytes]:
        nonlocal shown
        yield from honest(response, size)
        for _ in range(1000):  # 64 MB, and not without end: a device that took it all would have no memory left
            shown += 1
            yield b"x" * 65_536

    monkeypatch.setattr(httpx.Response, "iter_raw", ever_more)
    with pytest.raises(PeerError, match="more than 1000 bytes"):
        list(line.read(wanted))
    assert shown == 1
    with pytest.raises(PeerError, match=f"more than {MAX_DESCRIPTION_BYTES} bytes"):
        line.describe(None, None)
    assert shown < 400


def test_a_version_that_was_tampered_with_is_pulled_again(line: Line, versions: Versions) -> None:
    path = pull(line, versions).path
    with (path / "model.onnx.data").open("r+b") as file:
        file.write(b"\x01")
    assert pull(line, versions).received == BIG
    verify(path)


def test_an_export_that_was_made_again_meanwhile_is_said(offered: Endpoint, line: Line, versions: Versions) -> None:
    class ExportedAgain(Passing):
        def describe(self, job: str | None, form: str | None) -> ModelDescription:
            found = self.line.describe(job, form)
            path = offered.home.path / "runs" / "first" / "onnx" / "int4" / MANIFEST
            path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
            return found

    with pytest.raises(InputError, match="exported again, after its release"):
        pull(ExportedAgain(line), versions)
    with pytest.raises(InputError, match="exported again, after its release"):
        pull(line, versions)
    release(offered, "first")
    assert pull(line, versions).manifest.provenance == {"seed": 1}


def test_two_pulls_at_once_take_turns(line: Line, versions: Versions) -> None:
    with versions.changing(), pytest.raises(InputError, match=f"process {os.getpid()} serves it already"):
        pull(line, versions)


def test_the_newest_release_is_offered_also_where_it_is_of_an_older_job(
    offered: Endpoint, line: Line, versions: Versions
) -> None:
    offer(offered, "second", "int4", 10, 1)
    finish(offered, "second", 2)
    assert pull(line, versions).path.name.startswith("second-int4-")
    with pytest.raises(PeerError, match="this device has installed release"):
        pull(line, versions, "first")
    release(offered, "first")
    assert pull(line, versions).path.name.startswith("first-int4-")
