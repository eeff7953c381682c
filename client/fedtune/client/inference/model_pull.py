"""The pull of a finished job's exported model, or of a base model's edge pack, from the fleet's server.

    line = PatientLine(ModelLine(server, authority, node_key))
    path = pull(line, Versions(home / "models"), key_after)

Received bytes are kept: a pull that was interrupted by the network or a crash resumes at the same byte. No input is
trusted: the model is one that the fleet's owner has released, not before the one that the device has; names and sizes
come from the manifest that the release names, and a file whose SHA-256 digest differs from the manifest's is removed
before the version gets its name.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import fsync
from pathlib import Path

from fedtune.client.inference.model_line import PatientLine
from fedtune.client.inference.model_versions import Versions
from fedtune.core.errors import ExportError, InputError, PeerError, RunError
from fedtune.core.host.private_files import write_private
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.messages import PROTOCOL_VERSION
from fedtune.core.protocol.model_manifest import (
    FORMATS,
    MANIFEST,
    PACK_FORMAT,
    PACK_KIND,
    FileEntry,
    Manifest,
    digest_file,
    parse_manifest,
    read_manifest,
    verify,
)
from fedtune.core.protocol.model_requests import MAX_PIECE_BYTES, ModelDescription, ReadModel

FIRST_PIECE, SHORTEST_PIECE = 256 << 10, 32 << 10
QUICK_SECONDS, SLOW_SECONDS = 1.0, 15.0  # a faster piece makes the next one larger, a slower one makes it smaller

Progress = Callable[[int, int], None]
"""Receives the bytes that have arrived and the total bytes."""

KeyAfter = Callable[[bytes], bytes]
"""Returns the owner's public key after a fleet's log from the server; raises `PeerError` if the log is refused."""


@dataclass(frozen=True)
class Pulled:
    """The outcome of a pull.

    Args:
        path: folder of the version that is now current.
        release: the owner's release of it.
        received: bytes received in this pull.
        total: bytes of the whole version.
    """

    path: Path
    manifest: Manifest
    release: ModelRelease
    received: int
    total: int


def pull(
    line: PatientLine,
    versions: Versions,
    key_after: KeyAfter,
    job: str | None = None,
    form: str | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Downloads a released model and makes it the current version; the current one becomes the previous.

    Args:
        job: a finished job, or a pack's name; None for the one of the newest release.
        form: "int4", ...; None for the smallest available; "edge" for a pack.

    Raises:
        InputError: there is no such model or format, the device is unknown, or another process pulls.
        PeerError: the owner has not released this model, or released a newer one before; or the received data differ
            from those announced, and were removed.
        RunError: the network was down for too long, or the disk is full; the next pull resumes.
    """
    if form not in (None, *FORMATS, PACK_FORMAT):
        raise InputError(f"--format {form}: unknown; expected one of {', '.join((*FORMATS, PACK_FORMAT))}")
    with versions.changing(), _kept(versions):
        offer = line.describe(job, form)
        version = _admitted(offer, PACK_KIND if form == PACK_FORMAT else "model", versions, key_after)
        if (job or version.release.name, form or offer.format) != (version.release.name, offer.format):
            raise PeerError(f"the server offers {version.release.name} as {offer.format}, which was not requested")
        received = 0
        if not _is_whole(versions.folder / version.name):
            received = _fetch(line, versions, version, progress or (lambda *_: None))
        versions.install(version.name, version.release)
        path = versions.folder / version.name
        return Pulled(path, version.manifest, version.release, received, version.total)


@dataclass(frozen=True)
class _Version:
    """The version to pull.

    Args:
        manifest: the offer's, checked.
        digest: SHA-256 of the offer's manifest, in hexadecimal digits.
    """

    offer: ModelDescription
    release: ModelRelease
    manifest: Manifest
    digest: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.release.name}-{self.offer.format}-{self.digest[:12]}"

    @property
    def total(self) -> int:
        """The total bytes of its files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def piece(self, file: str, offset: int, size: int) -> ReadModel:
        """Returns the request for `size` bytes of a file."""
        return ReadModel(PROTOCOL_VERSION, self.release.name, self.offer.format, self.digest, file, offset, size)


def _fetch(line: PatientLine, versions: Versions, version: _Version, progress: Progress) -> int:
    """Downloads the missing files, checks all of them, and gives the version its name.

    Returns:
        Bytes received.
    """
    folder = versions.incoming(version.name)
    files = version.manifest.files
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()  # an incomplete manifest, left by a crash
    _take_over(versions.current, folder, version.manifest)
    missing = version.total - sum(min(entry.bytes, _size(folder / name)) for name, entry in files.items())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise RunError(f"{folder}: {missing:,} bytes are to come, and {free:,} are free")
    done = received = 0
    pace = _Pace()
    for name, entry in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            while (offset := file.tell()) < entry.bytes:
                began = time.monotonic()
                for chunk in line.read(version.piece(name, offset, min(pace.size, entry.bytes - offset))):
                    file.write(chunk)
                    received += len(chunk)
                    progress(done + file.tell(), version.total)
                pace.took(time.monotonic() - began)
            file.flush()
            fsync(file.fileno())
        _hold_against(path, name, entry)
        done += entry.bytes
    write_private(folder / MANIFEST, version.offer.manifest)  # last, since the manifest makes it an exported directory
    verify(folder)
    versions.admit(version.name)
    return received


class _Pace:
    """Adapts the size of the next piece to the speed, so that no piece takes minutes."""

    def __init__(self) -> None:
        self.size = FIRST_PIECE

    def took(self, seconds: float) -> None:
        """Updates the size by the duration of the last piece."""
        if seconds < QUICK_SECONDS:
            self.size = min(2 * self.size, MAX_PIECE_BYTES)
        elif seconds > SLOW_SECONDS:
            self.size = max(self.size // 2, SHORTEST_PIECE)


def _admitted(offer: ModelDescription, kind: str, versions: Versions, key_after: KeyAfter) -> _Version:
    """Holds an offer of this kind against what the fleet's owner has signed.

    Raises:
        PeerError: the owner has not released it, or it may not be installed any more.
    """
    release = ModelRelease.read(offer.release, key_after(offer.fleet), time.time())
    versions.check_newer(release)
    digest = hashlib.sha256(offer.manifest).hexdigest()
    if release.models.get(offer.format) != digest:
        raise PeerError(
            f"the server's {offer.format} is not the one that the fleet's owner has released for {release.name}: its "
            f"manifest has SHA-256 {digest[:12]}…"
        )
    try:
        manifest = parse_manifest(offer.manifest, "the server's offer")
    except ExportError as error:
        raise PeerError(str(error)) from None
    if manifest.kind != kind or manifest.format != offer.format:
        found = f"{manifest.kind} in {manifest.format}"
        raise PeerError(f"the server's offer is {found}; expected {kind} in {offer.format}")
    return _Version(offer, release, manifest, digest)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except ExportError:
        return False
    return True


def _take_over(current: Path | None, folder: Path, manifest: Manifest) -> None:
    """Copies files that the current version shares, such as the tokenizer, so that they are not downloaded."""
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
    """Turns a full or failing disk into an error with advice; the current version stays as it was."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise RunError(
            f"{versions.folder}: {reason}; the current model is as it was. Then go on with: fedtune client pull"
        ) from error
