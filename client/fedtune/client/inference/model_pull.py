"""Pulling the exported model of a finished job from the fleet's server, over whatever line there is.

    line = ModelLine(server, authority, name, node_key)
    path = pull(line, Versions(home / "models"))

What arrives stays: a pull that was broken off, by the line or by a crash, goes on at the byte where it was. Nothing is
believed: names come from a manifest that was checked, sizes are its sizes, and a file whose SHA-256 is another than
the manifest's is thrown away before the version gets its name.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from os import fsync
from pathlib import Path

import httpx

from fedtune.client.inference.model_versions import Versions
from fedtune.core.errors import ExportError, FedtuneError, InputError, PeerError, RunError
from fedtune.core.host.private_files import write_private
from fedtune.core.protocol.enrolment import load_node_key
from fedtune.core.protocol.model_manifest import (
    FORMATS,
    MANIFEST,
    FileEntry,
    Manifest,
    digest_file,
    parse_manifest,
    read_manifest,
    verify,
)
from fedtune.core.protocol.model_requests import (
    DESCRIBE,
    MAX_DESCRIPTION_BYTES,
    MAX_PIECE_BYTES,
    READ,
    DescribeModel,
    ModelDescription,
    ReadModel,
    sign_request,
)
from fedtune.core.protocol.payloads import PROTOCOL_VERSION, Payload, decode, encode
from fedtune.core.text import one_line

FIRST_PIECE, SHORTEST_PIECE = 256 << 10, 32 << 10
QUICK_SECONDS, SLOW_SECONDS = 1.0, 15.0  # a piece that takes less makes the next larger; one that takes more, smaller
CALL_SECONDS = 30.0  # without a single byte
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds between tries; after the last, the pull gives up for now
MAX_CLOCK_ERROR = 2.0
_MAX_TEXT = 2000
_CHUNK = 64 << 10

Progress = Callable[[int, int], None]
"""Told the bytes that are there, and the bytes there will be."""


class LineError(FedtuneError):
    """The server cannot be reached now; it may be reached later."""


@dataclass(frozen=True)
class Pulled:
    """What a pull led to.

    Args:
        path: of the version that is current now.
        received: bytes that came over the line, this time.
        total: bytes of the whole version.
    """

    path: Path
    manifest: Manifest
    received: int
    total: int


class ModelLine:
    """A device's signed requests for models.

    Args:
        server: HOST:PORT.
        authority: the only certificate authority that is trusted, PEM.
        device: the name it was enrolled under.
        node_key: private key of the device, PEM.
    """

    def __init__(self, server: str, authority: bytes, device: str, node_key: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=authority.decode("ascii"))
        self._client = httpx.Client(base_url=f"https://{server}", verify=context, timeout=CALL_SECONDS)
        self._device, self._key = device, load_node_key(node_key)
        self._ahead = 0.0  # seconds by which this device's clock is ahead of the server's

    def close(self) -> None:
        """Gives the connection back."""
        self._client.close()

    def describe(self, job: str | None, form: str | None) -> ModelDescription:
        """What the server has.

        Raises:
            InputError: it has no such model, or does not know this device.
            PeerError: it answers with something else.
            LineError: it cannot be reached.
        """
        with self._ask(DESCRIBE, DescribeModel(PROTOCOL_VERSION, job, form)) as response:
            content = bytearray()
            for chunk in response.iter_bytes(_CHUNK):
                content += chunk
                if len(content) > MAX_DESCRIPTION_BYTES:
                    raise PeerError(f"the server's offer is larger than {MAX_DESCRIPTION_BYTES:,} bytes")
        return decode(bytes(content), ModelDescription, MAX_DESCRIPTION_BYTES)

    def read(self, wanted: ReadModel) -> Iterator[bytes]:
        """A piece of a file, as it comes in; never more than was asked for.

        Raises:
            InputError, PeerError, LineError: as `describe`.
        """
        left = wanted.size
        with self._ask(READ, wanted) as response:
            for chunk in response.iter_bytes(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise PeerError(f"{wanted.file}: the server sent more than was asked for")
                yield chunk

    @contextmanager
    def _ask(self, path: str, payload: Payload) -> Iterator[httpx.Response]:
        body = encode(payload)
        try:
            with self._send(path, body) as response:
                if response.status_code != 401 or not self._correct_clock(response):
                    _check(response)
                    yield response
                    return
            with self._send(path, body) as response:
                _check(response)
                yield response
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            trust = "certificate" in reason.lower()
            raise LineError(f"the server {'is not trusted' if trust else 'cannot be reached'}: {reason}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PeerError(f"the server's answer cannot be read: {error}") from error

    @contextmanager
    def _send(self, path: str, body: bytes) -> Iterator[httpx.Response]:
        headers = sign_request(self._key, self._device, path, int(time.time() - self._ahead), body)
        # Not compressed on the way: what arrives is counted against what was asked for.
        with self._client.stream("POST", path, content=body, headers={**headers, "accept-encoding": "identity"}) as got:
            yield got

    def _correct_clock(self, response: httpx.Response) -> bool:
        """Takes over the server's clock; False where it is the one in use already."""
        try:
            ahead = time.time() - parsedate_to_datetime(response.headers.get("date", "")).timestamp()
        except ValueError:
            return False
        corrected = abs(ahead - self._ahead) > MAX_CLOCK_ERROR
        self._ahead = ahead
        return corrected


def pull(
    line: ModelLine,
    versions: Versions,
    job: str | None = None,
    form: str | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Brings a model here and makes it the current version; the one before stays as the previous.

    Args:
        job: a finished job; None for the last.
        form: "int4", ...; None for the smallest there is.

    Raises:
        InputError: there is no such model or format, the device is not known, or another process pulls.
        PeerError: what the server sent is not what it announced; it was thrown away.
        RunError: the line broke for too long, or the disk is full; what arrived is kept, and the next pull goes on.
    """
    if form not in (None, *FORMATS):
        raise InputError(f"--format {form}: unknown; expected one of {', '.join(FORMATS)}")
    with versions.changing(), _kept(versions):
        offer = _patiently(lambda: line.describe(job, form))
        if (job or offer.job, form or offer.format) != (offer.job, offer.format):
            raise PeerError(f"the server offers {offer.job} as {offer.format}, which nobody asked for")
        manifest = _checked(offer)
        digest = hashlib.sha256(offer.manifest).hexdigest()
        version = f"{offer.job}-{offer.format}-{digest[:12]}"
        total = sum(entry.bytes for entry in manifest.files.values())
        received = 0
        if not _is_whole(versions.folder / version):
            received = _fetch(line, versions, version, offer, digest, manifest, progress)
        versions.switch(version)
        return Pulled(versions.folder / version, manifest, received, total)


def _fetch(
    line: ModelLine,
    versions: Versions,
    version: str,
    offer: ModelDescription,
    digest: str,
    manifest: Manifest,
    progress: Progress | None,
) -> int:
    folder = versions.incoming(version)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in manifest.files:
            path.unlink()  # half of a manifest, left by a crash
    _take_over(versions.current, folder, manifest)
    total = sum(entry.bytes for entry in manifest.files.values())
    there = sum(min(entry.bytes, _size(folder / name)) for name, entry in manifest.files.items())
    free = shutil.disk_usage(folder).free
    if total - there > free:
        raise RunError(f"{folder}: {total - there:,} bytes are to come, and {free:,} are free")
    done = received = 0
    pace = _Pace()
    for name, entry in manifest.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            while (offset := file.tell()) < entry.bytes:
                size = min(pace.size, entry.bytes - offset)
                wanted = ReadModel(PROTOCOL_VERSION, offer.job, offer.format, digest, name, offset, size)
                began = time.monotonic()
                for chunk in _through_breaks(line, wanted):
                    file.write(chunk)
                    received += len(chunk)
                    if progress:
                        progress(done + file.tell(), total)
                pace.took(time.monotonic() - began)
            file.flush()
            fsync(file.fileno())
        _hold_against(path, name, entry)
        done += entry.bytes
    write_private(folder / MANIFEST, offer.manifest)  # last: from here on it is an exported directory
    verify(folder)
    versions.admit(version)
    return received


def _through_breaks(line: ModelLine, wanted: ReadModel) -> Iterator[bytes]:
    """The piece, whatever the line does: after a break it goes on where it was."""
    got = failures = 0
    while got < wanted.size:
        rest = ReadModel(
            wanted.version,
            wanted.job,
            wanted.format,
            wanted.manifest,
            wanted.file,
            wanted.offset + got,
            wanted.size - got,
        )
        try:
            for chunk in line.read(rest):
                got += len(chunk)
                failures = 0
                yield chunk
            if got < wanted.size:
                raise LineError(f"{wanted.file}: the server sent less than was asked for")
        except LineError as error:
            _pause(failures, error)
            failures += 1


def _patiently(ask: Callable[[], ModelDescription]) -> ModelDescription:
    failures = 0
    while True:
        try:
            return ask()
        except LineError as error:
            _pause(failures, error)
            failures += 1


def _pause(failures: int, error: LineError) -> None:
    if failures >= len(PAUSES):
        raise RunError(f"{error}; what has arrived is kept, go on with: fedtune client pull") from error
    time.sleep(PAUSES[failures])


class _Pace:
    """How large the next piece is: a fast line takes large ones, a slow one none that would take minutes."""

    def __init__(self) -> None:
        self.size = FIRST_PIECE

    def took(self, seconds: float) -> None:
        """Learns from the last piece."""
        if seconds < QUICK_SECONDS:
            self.size = min(2 * self.size, MAX_PIECE_BYTES)
        elif seconds > SLOW_SECONDS:
            self.size = max(self.size // 2, SHORTEST_PIECE)


def _checked(offer: ModelDescription) -> Manifest:
    try:
        manifest = parse_manifest(offer.manifest, "the server's offer")
    except ExportError as error:
        raise PeerError(str(error)) from None
    if manifest.kind != "model" or manifest.format != offer.format:
        raise PeerError(
            f"the server's offer is {manifest.kind} in {manifest.format}; expected a model in {offer.format}"
        )
    return manifest


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except ExportError:
        return False
    return True


def _take_over(current: Path | None, folder: Path, manifest: Manifest) -> None:
    """Files that the current version has, too, need not travel again: the tokenizer seldom changes."""
    try:
        held = read_manifest(current).files if current else {}
    except ExportError:
        return
    names = {entry: name for name, entry in held.items()}
    for name, entry in manifest.files.items():
        path = folder / name
        if current is None or entry not in names or path.exists():
            continue
        source = current / names[entry]
        if source.is_file() and digest_file(source) == entry:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)


def _hold_against(path: Path, name: str, entry: FileEntry) -> None:
    found = digest_file(path)
    if found != entry:
        path.unlink()
        raise PeerError(
            f"{name}: what arrived has SHA-256 {found.sha256[:12]}…, expected {entry.sha256[:12]}…; it was removed"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def _kept(versions: Versions) -> Iterator[None]:
    """Turns a full or failing disk into an error that says what to do; the current version is as it was."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise RunError(
            f"{versions.folder}: {reason}; the current model is as it was. Then go on with: fedtune client pull"
        ) from error


def _check(response: httpx.Response) -> None:
    """Makes sure that it is what was asked for.

    Raises:
        InputError, PeerError, LineError: what the server answered instead.
    """
    status = response.status_code
    if status == 200:
        return
    text = one_line(next(response.iter_bytes(_MAX_TEXT), b"").decode("utf-8", "replace")) if status < 500 else ""
    if status == 401:
        raise InputError("the server does not know this device; was it revoked?")
    if status == 404 and text:
        raise InputError(text)
    if status in (404, 405):
        raise PeerError("what answers at this address offers no models; does the server run this fedtune version?")
    if status < 500:
        raise PeerError(f"the server refuses the request with status {status}: {text}")
    raise LineError(f"the server answered {status}")
