"""The exported models of finished jobs, offered to enrolled devices by two calls between the guard and Flower's app.

A device reads a file in pieces, each with a signed request, so that it can continue after a broken connection or a
restart of either side. Only files in an export's manifest can be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

from fedtune.core.errors import FedtuneError, InputError, PeerError
from fedtune.core.host.private_files import read_bounded
from fedtune.core.protocol.messages import PROTOCOL_VERSION, decode, encode
from fedtune.core.protocol.model_manifest import FORMATS, MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_REQUEST_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
    check_request,
)
from fedtune.flower.guard import App, Receive, Scope, Send, answer, whole_body
from fedtune.server.live.enrolled_devices import Devices, changed
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.server_home import ServerHome

FOLDER = "onnx"  # the folder in a run directory
_CHUNK_BYTES = 256 << 10  # read at once; small, so that many slow devices need little memory
_NAMED = 10  # jobs in a refusal


class NoSuchModelError(FedtuneError):
    """Raised when a device asks for a model that does not exist; the message names those that do."""


class ModelRegistry:
    """The models that a server offers: `runs/JOB/onnx/FORMAT` of every finished job."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._jobs = Jobs(home)

    def find(self, job: str | None, form: str | None) -> tuple[str, str, Path]:
        """Returns job, format and directory of the model that a request means.

        Raises:
            NoSuchModelError: there is no such model.
        """
        finished = self._jobs.finished()
        wanted = reversed(finished) if job is None else [job] if job in finished else []
        name, forms = next(((name, forms) for name in wanted if (forms := self._formats(name))), ("", []))
        if not forms:
            known = ", ".join([name for name in reversed(finished) if self._formats(name)][:_NAMED]) or "none yet"
            asked = f"job {job}" if job else "finished jobs"
            raise NoSuchModelError(
                f"{asked}: no exported model is offered; jobs with one: {known}. A job exports at its end what its "
                "[export] names; later, on the server: fedtune export RUN_DIR"
            )
        if form is not None and form not in forms:
            raise NoSuchModelError(f"job {name} was not exported as {form}; it was as {', '.join(forms)}")
        chosen = form or forms[0]
        return name, chosen, self._path(name, chosen)

    def _formats(self, name: str) -> list[str]:
        return [form for form in FORMATS if (self._path(name, form) / MANIFEST).is_file()]

    def _path(self, name: str, form: str) -> Path:
        return self._home.path / "runs" / name / FOLDER / form


class ModelEndpoints:
    """An ASGI application around Flower's application.

    Args:
        app: Flower's.
        home: the server's folder, with its devices and jobs.
    """

    def __init__(self, app: App, home: ServerHome) -> None:
        self._app, self._home, self._registry = app, home, ModelRegistry(home)
        self._keys: Mapping[str, bytes] = {}
        self._keys_seen = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the two calls, and passes everything else on."""
        if scope["type"] != "http" or scope["path"] not in (DESCRIBE, READ):
            await self._app(scope, receive, send)
            return
        body = await whole_body(receive, MAX_REQUEST_BYTES)
        if body is None:
            await answer(send, 413)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            check_request(headers, await asyncio.to_thread(self._known), scope["path"], time.time(), body)
        except FedtuneError:
            await answer(send, 401)
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
        name, form, directory = self._registry.find(asked.job, asked.format)
        text, manifest = _manifest(directory)
        if manifest.kind != "model":
            raise NoSuchModelError(f"job {name} was exported as {manifest.kind}; expected a model")
        await _begin(send, len(content := encode(ModelDescription(PROTOCOL_VERSION, name, form, text))))
        await send({"type": "http.response.body", "body": content})

    async def _read(self, asked: ReadModel, send: Send) -> None:
        _, _, directory = self._registry.find(asked.job, asked.format)
        text, manifest = _manifest(directory)
        entry = manifest.files.get(asked.file)
        if hashlib.sha256(text).hexdigest() != asked.manifest or entry is None:
            raise NoSuchModelError(f"job {asked.job} was exported again; pull it again")
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

    def _known(self) -> Mapping[str, bytes]:
        """Returns the public keys of the enrolled devices; a revoked device's next request is refused."""
        seen = changed(self._home)
        if seen != self._keys_seen:
            self._keys, self._keys_seen = Devices.load(self._home).node_keys, seen
        return self._keys


def _manifest(directory: Path) -> tuple[bytes, Manifest]:
    try:
        text = read_bounded(directory / MANIFEST, "a manifest", MAX_MANIFEST_BYTES)
        return text, parse_manifest(text, "the manifest")
    except InputError:
        raise NoSuchModelError("the model's manifest cannot be read on the server") from None


async def _begin(send: Send, length: int, status: int = 200, kind: bytes = b"application/octet-stream") -> None:
    headers = [(b"content-length", str(length).encode()), (b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _say(send: Send, status: int, text: str) -> None:
    content = text.encode()[:2000]
    await _begin(send, len(content), status, b"text/plain; charset=utf-8")
    await send({"type": "http.response.body", "body": content})
