"""The models and edge packs that the fleet's owner has released, offered by two calls before Flower's app.

    runs/JOB/onnx/FORMAT/         an exported directory
    runs/JOB/onnx/release.json    the owner's release of the formats that it names
    packs/NAME/edge/              an edge pack of a base model
    packs/NAME/release.json       the owner's release of it

A device reads a file in pieces, each with a signed request, so that it can continue after a broken connection or a
restart of either side. Only files in a released export's manifest can be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedtune.core.errors import ExportError, FedtuneError, InputError, PeerError
from fedtune.core.host.private_files import read_bounded, write_private
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.messages import PROTOCOL_VERSION, decode, encode
from fedtune.core.protocol.model_manifest import (
    FORMATS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PACK_FORMAT,
    Manifest,
    manifest_digest,
    parse_manifest,
)
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_RELEASE_BYTES,
    MAX_REQUEST_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
)
from fedtune.flower.guard import App, Receive, Scope, Send, answer, whole_body
from fedtune.server.live.enrolled_devices import Devices, changed
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.server_home import ServerHome

FOLDER = "onnx"  # the folder in a run directory
PACKS = "packs"
RELEASE = "release.json"
_CHUNK_BYTES = 256 << 10  # read at once; small, so that many slow devices need little memory
_NAMED = 10  # jobs in a refusal


class NoSuchModelError(FedtuneError):
    """Raised when a device asks for a model that does not exist; the message names those that do."""


class ModelRegistry:
    """The models and packs that a server offers: what the owner has released of those that are here."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._jobs = Jobs(home)

    def find(self, job: str | None, form: str | None) -> tuple[ModelRelease, str, Path]:
        """Returns release, format and directory of the model that a request means.

        Args:
            job: None for the one of the newest release.
            form: None for the job's smallest; packs have a format of their own.

        Raises:
            NoSuchModelError: there is no such model.
        """
        pack = form == PACK_FORMAT
        released = sorted(self._released(pack), key=lambda release: release.number, reverse=True)
        release = next((one for one in released if job in (None, one.name)), None)
        if release is None and pack:
            known = ", ".join([one.name for one in released][:_NAMED]) or "none yet"
            raise NoSuchModelError(
                f"{job}: no edge pack of this name is released; packs: {known}. On the server: fedtune edge pack BASE "
                f"--out {self._home.path / PACKS / 'NAME' / PACK_FORMAT}; the fleet's owner releases it with: fedtune "
                "fleet publish PACK_DIR"
            )
        if release is None:
            known = ", ".join([one.name for one in released][:_NAMED]) or "none yet"
            asked = f"job {job}" if job else "finished jobs"
            raise NoSuchModelError(
                f"{asked}: no model is released; jobs with one: {known}. A job exports at its end what its [export] "
                "names, or later, on the server: fedtune export RUN_DIR; the fleet's owner releases it with: fedtune "
                "fleet publish MODEL_DIR"
            )
        forms = [form for form in (*FORMATS, PACK_FORMAT) if form in release.models]
        if form is not None and form not in forms:
            raise NoSuchModelError(f"job {release.name} was not released as {form}; it was as {', '.join(forms)}")
        chosen = form or forms[0]
        return release, chosen, self._folder(release) / chosen

    def take(self, data: bytes) -> ModelRelease:
        """Takes a release from the fleet's owner, and offers its models to devices from now on; raises as `check`."""
        release = self.check(data)
        write_private(self._folder(release) / RELEASE, data)
        return release

    def check(self, data: bytes) -> ModelRelease:
        """Returns a release that the registry would take.

        Raises:
            InputError: devices would refuse it, or it is not of the models that are here.
        """
        try:
            release = ModelRelease.read(data, Devices.load(self._home).fleet.key, time.time())
        except PeerError as error:
            raise InputError(str(error)) from None
        compared = [one for one in self._released(release.is_pack) if not one.is_pack or one.name == release.name]
        newest = max(compared, key=lambda one: one.number, default=release)
        if newest.number >= release.number and newest.data != data:
            raise InputError(
                f"release {release.number} does not come after {newest.number}, which is here, so devices would refuse "
                f"it; copy {self._folder(newest) / RELEASE} into the owner's folder and release the model again"
            )
        if not release.is_pack and release.name not in self._jobs.finished():
            raise InputError(f"{release.name}: no finished job has this name; fedtune fleet publish takes --name")
        for form, digest in release.models.items():
            path = self._folder(release) / form
            with suppress(OSError):
                if manifest_digest(path) == digest:
                    continue
            raise InputError(f"{path}: not the {form} that was released; expected an export of SHA-256 {digest[:12]}…")
        return release

    def _released(self, packs: bool) -> Iterator[ModelRelease]:
        """Yields the releases of packs, or those of finished jobs' models."""
        folders = [self._home.path / "runs" / name / FOLDER for name in self._jobs.finished()]
        if packs:
            folders = sorted((self._home.path / PACKS).glob("*"))
        for folder in folders:
            with suppress(InputError, PeerError):  # without a release, or with one of a format to come
                release = ModelRelease.unchecked(read_bounded(folder / RELEASE, "a release", MAX_RELEASE_BYTES))
                if self._folder(release) == folder:
                    yield release

    def _folder(self, release: ModelRelease) -> Path:
        if release.is_pack:
            return self._home.path / PACKS / release.name
        return self._home.path / "runs" / release.name / FOLDER


class ModelEndpoints:
    """An ASGI application around Flower's application, behind the guard, which knows the device that asks.

    Args:
        app: Flower's.
        home: the server's folder, with its devices and jobs.
    """

    def __init__(self, app: App, home: ServerHome) -> None:
        self._app, self._home, self._registry = app, home, ModelRegistry(home)
        self._log, self._seen = b"", -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the two calls, and passes everything else on."""
        if scope["type"] != "http" or scope["path"] not in (DESCRIBE, READ):
            await self._app(scope, receive, send)
            return
        body = await whole_body(receive, MAX_REQUEST_BYTES)
        if body is None:
            await answer(send, 413)
            return
        try:
            if scope["path"] == DESCRIBE:
                await self._describe(decode(body, DescribeModel, MAX_REQUEST_BYTES), send)
            else:
                await self._read(decode(body, ReadModel, MAX_REQUEST_BYTES), send)
        except PeerError as error:
            await _say(send, 400, str(error))
        except NoSuchModelError as error:
            await _say(send, 404, str(error))

    async def _describe(self, asked: DescribeModel, send: Send) -> None:
        release, form, directory = self._registry.find(asked.job, asked.format)
        text, _ = _manifest(directory, release.models[form])
        fleet = await asyncio.to_thread(self._fleet_log)
        content = encode(ModelDescription(PROTOCOL_VERSION, form, text, release.data, fleet))
        await _begin(send, len(content))
        await send({"type": "http.response.body", "body": content})

    async def _read(self, asked: ReadModel, send: Send) -> None:
        _, _, directory = self._registry.find(asked.job, asked.format)
        _, manifest = _manifest(directory, asked.manifest)
        entry = manifest.files.get(asked.file)
        if entry is None:
            raise NoSuchModelError(f"{asked.file[:80]}: no such file in {asked.job}, {asked.format}")
        if asked.offset >= entry.bytes:
            raise PeerError(f"{asked.file} has {entry.bytes} bytes; got the offset {asked.offset}")
        left = min(asked.size, entry.bytes - asked.offset)
        try:
            file = (directory / asked.file).open("rb")
        except OSError:
            raise NoSuchModelError(f"{asked.file} cannot be read on the server") from None
        with file:
            file.seek(asked.offset)
            await _begin(send, left)
            while left and (chunk := await asyncio.to_thread(file.read, min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})

    def _fleet_log(self) -> bytes:
        seen = changed(self._home)
        if seen != self._seen:
            self._log, self._seen = Devices.load(self._home).log, seen
        return self._log


def _manifest(directory: Path, digest: str) -> tuple[bytes, Manifest]:
    """Returns an export's manifest, as bytes and read, if it is the one that is meant."""
    try:
        text = read_bounded(directory / MANIFEST, "a manifest", MAX_MANIFEST_BYTES)
        manifest = parse_manifest(text, "the manifest")
    except (InputError, ExportError):
        raise NoSuchModelError("the model's manifest cannot be read on the server") from None
    if hashlib.sha256(text).hexdigest() != digest:
        raise NoSuchModelError(
            "the model was exported again, after its release; pull it again once the fleet's owner has released it"
        )
    return text, manifest


async def _begin(send: Send, length: int, status: int = 200, kind: bytes = b"application/octet-stream") -> None:
    headers = [(b"content-length", str(length).encode()), (b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _say(send: Send, status: int, text: str) -> None:
    content = text.encode()[:2000]
    await _begin(send, len(content), status, b"text/plain; charset=utf-8")
    await send({"type": "http.response.body", "body": content})
