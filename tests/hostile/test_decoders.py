"""Every decoder of foreign bytes and of files takes what its writer wrote, and refuses all else with its own error.

Arbitrary bytes, bytes with a few of them damaged, values with one part changed (signed again, where the owner's key
could sign them), values nested too deeply to follow, and values beyond the limit: the error that the decoder documents,
and no other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from damage import changed, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from owner import enroll, invitation, make_server

from fedtune.client.live.device_home import ClientHome
from fedtune.core.errors import ExportError, FedtuneError, InputError, PeerError, RunError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.local_work import local_work
from fedtune.core.manifest.fleet_log import KIND as ENTRY
from fedtune.core.manifest.fleet_log import Change, Fleet, append, extended, replay
from fedtune.core.manifest.job_manifest import KIND as MANIFEST
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.joining import (
    JOIN,
    Invitation,
    JoinRequest,
    PrivateKeys,
    load_node_key,
    read_public,
)
from fedtune.core.manifest.model_release import KIND as RELEASE
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.manifest.signed import Signed
from fedtune.core.protocol.bundles import CollectReplies
from fedtune.core.protocol.device_calls import (
    MAX_PIECE_BYTES,
    AnnounceAnswer,
    AppendPiece,
    Assignment,
    BringAnswer,
    ReadPart,
    Received,
    Refused,
    Taken,
)
from fedtune.core.protocol.messages import (
    PROTOCOL_VERSION,
    Base,
    Downlink,
    EvaluateReply,
    EvaluateRequest,
    Payload,
    Rebasing,
    TrainReply,
    TrainRequest,
    Uplink,
    decode,
    encode,
)
from fedtune.core.protocol.model_manifest import FileEntry, Manifest, parse_manifest
from fedtune.core.protocol.model_requests import DescribeModel, ModelDescription, ReadModel
from fedtune.core.protocol.registration import Registration, RegistrationReply
from fedtune.core.secagg.identity import Identity
from fedtune.core.secagg.round_log import FileRoundLog
from fedtune.server.live.join_endpoint import JoinEndpoint
from fedtune.server.live.server_home import ServerConfig, ServerHome
from fedtune.server.run_directory import Checkpoint, RunDirectory
from fedtune.strategies.cohorts.suspicion import Circle, Suspicion
from fedtune.strategies.federation import FederationState

OWNER = Identity(b"\x01" * 32)
KEYS = PrivateKeys.generate()
NOW = 1_800_000_000.0
HEX = "0" * 64
BASE = Base("demo", HEX, "nf4", 40, 32.0, ("all-linear",), 256, "core", HEX)
JOB = load_job(None, ["training.learning_rate=0.03"])
TERMS = JobTerms(JOB, BASE)
LOG, FLEET = append(b"", Fleet(OWNER.public), OWNER, Change({"ada": KEYS.public}), NOW + 10)
ADAPTER = Downlink("", HEX, (b"one", b"two"))
UPLINK = Uplink("ring", 5, 1.0, False, 10, (1.0, 2.0), True, (8, 40))
WORK = local_work(JOB.training, "ab", learning_rate=0.03)
PAYLOADS: tuple[Payload, ...] = (
    Registration(PROTOCOL_VERSION, "0.1", JobManifest.sign(OWNER, "first", TERMS, NOW + 10).data, LOG),
    RegistrationReply(PROTOCOL_VERSION, "0.1", 1, 4, 8000, "", "", 8, "packed", 256, 100, 1.5),
    TrainRequest(PROTOCOL_VERSION, 1, 1, BASE, WORK, UPLINK, ADAPTER, 8, None),
    EvaluateRequest(PROTOCOL_VERSION, 1, 1, BASE, 0.1, ADAPTER),
    TrainReply(1, 10, 100, 5, 1.5, 2.0, (b"words", b"norms")),
    EvaluateReply(1, 10, 100, 1.5, 0.5),
    DescribeModel(PROTOCOL_VERSION, "first", "int4"),
    ModelDescription(PROTOCOL_VERSION, "int4", b"{}", b"release", LOG),
    ReadModel(PROTOCOL_VERSION, "first", "int4", HEX, "model.onnx", 0, 100),
    Taken(Assignment(HEX, "train", "1", (b"payload",))),
    Taken(Assignment(HEX, "query.open", "1", (), (1000, 2000))),
    Taken(None),
    ReadPart(HEX, 1, 1000),
    BringAnswer(HEX, 1.0, b"payload"),
    BringAnswer(HEX, 1.0, b"", Refused("a reason", True)),
    AnnounceAnswer(HEX, 1.0, 2 * MAX_PIECE_BYTES, bytes(32)),
    AppendPiece(HEX, 1000, b"piece"),
    Received(1000),
    CollectReplies((HEX,)),
)


@dataclass(frozen=True)
class Decoder:
    """A decoder of JSON.

    Args:
        read: decodes bytes.
        honest: what the writer writes.
        error: the one error that `read` documents.
        written: JSON value to bytes, with a signature where the decoder wants one.
        limit: most bytes that are read; 0 where the reader of the file bounds them.
    """

    read: Callable[[bytes], object]
    honest: bytes
    error: type[FedtuneError]
    written: Callable[[Any], bytes]
    limit: int = 0


def plain(value: Any) -> bytes:
    return json.dumps(value).encode()


def signed(kind: str) -> Callable[[Any], bytes]:
    """Returns a writer that signs a changed statement again, so that its content is read."""

    def write(value: Any) -> bytes:
        whole = isinstance(value, dict) and value.get("kind") == kind and isinstance(value.get("content"), dict)
        return Signed.sign(OWNER, kind, value["content"]).to_bytes() if whole else plain(value)

    return write


def of_file(folder: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Returns a decoder of bytes, from one of a file."""

    def decoder(data: bytes) -> object:
        path = folder / "file"
        path.write_bytes(data)
        path.chmod(0o600)
        return read(path)

    return decoder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> ServerHome:
    made = make_server(tmp_path_factory.mktemp("site") / "server", ServerConfig("localhost:8443", "127.0.0.1", 0))
    enroll(made, "ada")
    return made


def model_manifest() -> bytes:
    entry = FileEntry(HEX, 10)
    return plain(Manifest("model", "first", "int4", {"job": "first"}, {"model.onnx": entry}, (1,), 64).to_json())


def device_file(folder: Path, home: ServerHome) -> bytes:
    data = folder / "data.jsonl"
    data.write_text('{"text": "x"}\n')
    return (ClientHome.join(folder / "device", invitation(home), "kitchen", data).path / "device.json").read_bytes()


DECODERS: dict[str, Callable[[Path, ServerHome], Decoder]] = {
    "job manifest": lambda folder, home: Decoder(
        lambda data: JobManifest.read(data, OWNER.public, NOW),
        JobManifest.sign(OWNER, "first", TERMS, NOW + 10).data,
        PeerError,
        signed(MANIFEST),
        256 << 10,
    ),
    "job manifest that is passed on": lambda folder, home: Decoder(
        JobManifest.unchecked, JobManifest.sign(OWNER, "first", TERMS, NOW + 10).data, PeerError, plain, 256 << 10
    ),
    "model release": lambda folder, home: Decoder(
        lambda data: ModelRelease.read(data, OWNER.public, NOW),
        ModelRelease.sign(OWNER, 3, "first", {"int4": HEX}, NOW + 10).data,
        PeerError,
        signed(RELEASE),
        4096,
    ),
    "fleet's log": lambda folder, home: Decoder(
        lambda data: replay(data, OWNER.public), LOG, PeerError, signed(ENTRY), 16 << 20
    ),
    "fleet's log that goes on": lambda folder, home: Decoder(
        lambda data: extended(LOG, data, OWNER.public), LOG, PeerError, signed(ENTRY), 16 << 20
    ),
    "request to join": lambda folder, home: Decoder(
        JoinRequest.from_bytes, JoinRequest.make("kitchen", KEYS).to_bytes(), PeerError, plain, 2 << 10
    ),
    "invitation": lambda folder, home: Decoder(
        of_file(folder, Invitation.load), invitation(home).to_bytes(), InputError, plain, 64 << 10
    ),
    "fleet's public key": lambda folder, home: Decoder(
        of_file(folder, read_public), OWNER.public.hex().encode() + b"\n", InputError, plain, 1 << 10
    ),
    "identity key": lambda folder, home: Decoder(of_file(folder, Identity.load), b"01" * 32 + b"\n", InputError, plain),
    "node key": lambda folder, home: Decoder(
        lambda data: load_node_key(data.decode("ascii", "replace")), KEYS.node.encode(), InputError, plain
    ),
    "device.json": lambda folder, home: Decoder(
        lambda data: read_device(folder / "device", data), device_file(folder, home), InputError, plain, 1 << 16
    ),
    "round log": lambda folder, home: Decoder(
        of_file(folder, lambda path: FileRoundLog(path).of("job")),
        plain({"job": {"last": (3, 1), "sums": 2, "survivors": [["ada", "bob"]]}}),
        InputError,
        plain,
        4 << 20,
    ),
    "model's manifest": lambda folder, home: Decoder(
        lambda data: parse_manifest(data, "the manifest"), model_manifest(), ExportError, plain
    ),
}


def read_device(path: Path, data: bytes) -> object:
    (path / "device.json").write_bytes(data)
    return ClientHome(path).config


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path: Path, home: ServerHome) -> Decoder:
    return DECODERS[request.param](tmp_path, home)


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def taken_or_refused(decoder: Decoder, data: bytes) -> None:
    with suppress(decoder.error):
        decoder.read(data)


def test_what_the_writer_wrote_is_read(decoder: Decoder) -> None:
    decoder.read(decoder.honest)


@FUZZ
@given(data=st.data())
def test_bytes_from_nowhere_and_damaged_ones_give_the_decoder_s_own_error(
    decoder: Decoder, data: st.DataObject
) -> None:
    taken_or_refused(decoder, data.draw(st.binary(max_size=200) | damaged(decoder.honest)))
    taken_or_refused(decoder, decoder.honest[: data.draw(st.integers(0, len(decoder.honest)))])


def test_values_with_one_part_changed_give_the_decoder_s_own_error(decoder: Decoder) -> None:
    try:
        honest = json.loads(decoder.honest)
    except ValueError:
        honest = decoder.honest.decode()  # a key as text
    for value in changed(honest):
        taken_or_refused(decoder, decoder.written(value))


def test_what_is_nested_too_deeply_or_beyond_the_limit_is_refused(decoder: Decoder) -> None:
    beyond = [decoder.honest + b" " * decoder.limit] if decoder.limit else []
    for bad in (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, *beyond):
        with pytest.raises(decoder.error):
            decoder.read(bad)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: type(payload).__name__)
@FUZZ
@given(data=st.data())
def test_damaged_payloads_are_taken_whole_or_give_a_peer_s_error(payload: Payload, data: st.DataObject) -> None:
    kind, honest = type(payload), encode(payload)
    assert decode(honest, kind) == payload
    payload_or_refusal(data.draw(st.binary(max_size=200) | damaged(honest)), kind)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: type(payload).__name__)
def test_payloads_with_one_part_changed_are_taken_whole_or_give_a_peer_s_error(payload: Payload) -> None:
    kind, honest = type(payload), encode(payload)
    for value in changed(msgspec.msgpack.decode(honest)):
        with suppress(OverflowError, UnicodeEncodeError):  # no such value can be written
            payload_or_refusal(msgspec.msgpack.encode(value), kind)
    for bad in (b"\x91" * 100_000, honest[:1] + msgspec.msgpack.encode(kind.__name__) + b"\x91" * 100_000):
        with pytest.raises(PeerError):
            decode(bad, kind)


def payload_or_refusal(data: bytes, kind: type[Payload]) -> None:
    with suppress(PeerError):
        found = decode(data, kind)
        assert decode(encode(found), kind) == found  # a number that is not one would differ from itself


@FUZZ
@given(data=st.data())
def test_the_one_open_door_answers_any_body_with_a_status(home: ServerHome, data: st.DataObject) -> None:
    honest = JoinRequest.make("kitchen", KEYS).to_bytes()
    body = data.draw(st.binary(max_size=200) | damaged(honest) | st.sampled_from(BODIES))
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(event: Any) -> None:
        statuses.append(event.get("status"))

    async def nothing(*event: Any) -> None:
        raise AssertionError("the call was passed on")

    asyncio.run(JoinEndpoint(nothing, home)({"type": "http", "path": JOIN}, receive, send))
    assert statuses[0] in (200, 400, 409, 413)


BODIES = [plain(value) for value in changed(json.loads(JoinRequest.make("kitchen", KEYS).to_bytes()))]


def test_a_checkpoint_that_is_damaged_is_no_whole_one(tmp_path: Path) -> None:
    job = load_job(None, ["training.learning_rate=0.03"])
    directory = RunDirectory.create(tmp_path / "run", job, HEX)
    ones = np.ones(3, np.float32)
    suspicion = Suspicion((Circle(frozenset("ab"), frozenset("c")), Circle(frozenset("d"))), ("e",))
    state = FederationState(0, ones, ones, {"b": 1.0}, {}, {}, Rebasing(1, HEX, 0), suspicion)
    directory.acknowledge(Checkpoint(state, HEX, HEX, 1.0, None, ("answer",)), None)
    restored = directory.restore()
    assert restored is not None
    assert restored.state.suspicion == suspicion
    path = tmp_path / "run" / "checkpoints" / "000000" / "state.json"
    honest = path.read_text()
    for text in (*(json.dumps(value) for value in changed(json.loads(honest))), honest[:-9], "[" * 100_000, ""):
        path.write_text(text)
        with suppress(RunError):  # none is whole
            directory.restore()
    directory.close()
