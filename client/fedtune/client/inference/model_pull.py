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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import fsync
from pathlib import Path

from fedtune.client.inference.model_line import PAUSES, Line, PatientLine
from fedtune.client.inference.model_versions import Versions
from fedtune.core.errors import ExportError, InputError, PeerError, RunError
from fedtune.core.host.private_files import write_private
from fedtune.core.protocol.messages import PROTOCOL_VERSION
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
from fedtune.core.protocol.model_requests import MAX_PIECE_BYTES, ModelDescription, ReadModel

FIRST_PIECE, SHORTEST_PIECE = 256 << 10, 32 << 10
QUICK_SECONDS, SLOW_SECONDS = 1.0, 15.0  # a piece that takes less makes the next larger; one that takes more, smaller

Progress = Callable[[int, int], None]
"""Told the bytes that are there, and the bytes there will be."""


@dataclass(frozen=True)
class Pulled:
    """The outcome of a pull.

    Args:
        path: of the version that is current now.
        received: bytes that came over the line, this time.
        total: bytes of the whole version.
    """

    path: Path
    manifest: Manifest
    received: int
    total: int


def pull(
    line: Line,
    versions: Versions,
    job: str | None = None,
    form: str | None = None,
    progress: Progress | None = None,
    pauses: Sequence[float] = PAUSES,
) -> Pulled:
    """Brings a model here and makes it the current version; the one before stays as the previous.

    Args:
        job: a finished job; None for the last.
        form: "int4", ...; None for the smallest there is.
        pauses: seconds between tries while the server cannot be reached; after the last, the pull gives up.

    Raises:
        InputError: there is no such model or format, the device is not known, or another process pulls.
        PeerError: what the server sent is not what it announced; it was thrown away.
        RunError: the line broke for too long, or the disk is full; what arrived is kept, and the next pull goes on.
    """
    if form not in (None, *FORMATS):
        raise InputError(f"--format {form}: unknown; expected one of {', '.join(FORMATS)}")
    patient = PatientLine(line, pauses)
    with versions.changing(), _kept(versions):
        offer = patient.describe(job, form)
        if (job or offer.job, form or offer.format) != (offer.job, offer.format):
            raise PeerError(f"the server offers {offer.job} as {offer.format}, which nobody asked for")
        version = _Version(offer, _checked(offer), hashlib.sha256(offer.manifest).hexdigest())
        received = 0
        if not _is_whole(versions.folder / version.name):
            received = _fetch(patient, versions, version, progress or (lambda *_: None))
        versions.switch(version.name)
        return Pulled(versions.folder / version.name, version.manifest, received, version.total)


@dataclass(frozen=True)
class _Version:
    """The version that is pulled.

    Args:
        manifest: the offer's, checked.
        digest: SHA-256 of the offer's manifest, in hexadecimal digits.
    """

    offer: ModelDescription
    manifest: Manifest
    digest: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.offer.job}-{self.offer.format}-{self.digest[:12]}"

    @property
    def total(self) -> int:
        """Bytes of all its files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def piece(self, file: str, offset: int, size: int) -> ReadModel:
        """The request for so many bytes of a file."""
        return ReadModel(PROTOCOL_VERSION, self.offer.job, self.offer.format, self.digest, file, offset, size)


def _fetch(line: PatientLine, versions: Versions, version: _Version, progress: Progress) -> int:
    """Brings the files that are missing, checks all of them, and gives the version its name.

    Returns:
        Bytes that came over the line.
    """
    folder = versions.incoming(version.name)
    files = version.manifest.files
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()  # half of a manifest, left by a crash
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
    write_private(folder / MANIFEST, version.offer.manifest)  # last: from here on it is an exported directory
    verify(folder)
    versions.admit(version.name)
    return received


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
