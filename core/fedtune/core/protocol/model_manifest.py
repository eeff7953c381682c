"""The manifest of an exported directory, which lists every model file with its SHA-256.

    manifest = verify(directory)

`fedtune.json` states the model's provenance and, under "files", name -> {"sha256", "bytes"} of every other file. The
manifest cannot prove its own authenticity: a device holds its digest against the release that the fleet's owner has
signed (`fedtune.core.manifest.model_release`), and others compare `manifest_digest` with one from a source they trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fedtune.core.errors import ExportError

MANIFEST = "fedtune.json"
CARD = "MODEL_CARD.md"
ADAPTER_SUFFIX = ".onnx_adapter"
Format = Literal["int4", "int8", "fp16", "fp32"]
FORMATS: tuple[Format, ...] = ("int4", "int8", "fp16", "fp32")  # of exported models, the smallest first
PACK_KIND, PACK_FORMAT = "edge-pack", "edge"  # of edge packs, see fedtune.edge.pack_facts
SCHEMA = 1
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 4096
_READ_BYTES = 1 << 20
_HEX_DIGITS = 64


@dataclass(frozen=True)
class FileEntry:
    """A file's entry in the manifest.

    Args:
        sha256: digest, 64 hexadecimal digits.
        bytes: size of the file.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """An exported directory's `fedtune.json`.

    Args:
        kind: "model" (adapter merged), "adapter-base" (the base, with the adapter's factors as inputs), "adapter" or
            "edge-pack".
        name: name under which the model is served.
        format: "int4", "int8", "fp16" or "fp32"; "edge" for an edge pack.
        provenance: base, adapter, job, rounds, clients, gate results, licence, versions: for people and audits.
        files: relative name with forward slashes -> its digest and size.
        start_tokens: tokens at the beginning of every prompt; chat templates write their own.
        context: largest number of tokens of prompt and completion together.
    """

    kind: str
    name: str
    format: str
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    start_tokens: tuple[int, ...] = ()
    context: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as the object in the file."""
        return {"schema": SCHEMA, **asdict(self)}


def digest_file(path: Path) -> FileEntry:
    """Returns SHA-256 and size of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return FileEntry(digest.hexdigest(), size)


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Returns every file under a directory except the manifest, by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: digest_file(path) for name, path in names.items() if name != MANIFEST}


def read_manifest(directory: Path) -> Manifest:
    """Reads `fedtune.json` without looking at the other files.

    Raises:
        ExportError: the file is missing or not a manifest.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ExportError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; expected a manifest")
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        inside = sorted(found.parent.name for found in directory.glob(f"*/{MANIFEST}"))
        hint = f"; expected one of its folders: {', '.join(inside)}" if inside else f"; it has no {MANIFEST}"
        raise ExportError(f"{directory}: not an exported directory{hint}") from error
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Reads a manifest's bytes.

    Args:
        where: name of their source in error messages.

    Raises:
        ExportError: the bytes are not a manifest of this schema.
    """
    try:
        value = json.loads(text)
        if value.pop("schema") != SCHEMA:
            raise ValueError(f"another schema; expected {SCHEMA}")
        files = {_name(name): _entry(entry) for name, entry in value.pop("files").items()}
        if not 0 < len(files) <= MAX_FILES:
            raise ValueError(f"{len(files)} files; expected 1 to {MAX_FILES}")
        start = tuple(int(token) for token in value.pop("start_tokens"))
        manifest = Manifest(files=files, start_tokens=start, **value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExportError(f"{where}: not a manifest: {error}") from error
    texts = (manifest.kind, manifest.name, manifest.format)
    if not all(isinstance(field, str) and field.isprintable() for field in texts):
        raise ExportError(f"{where}: not a manifest: kind, name and format must be printable text")
    if not isinstance(manifest.provenance, dict) or not isinstance(manifest.context, int):
        raise ExportError(f"{where}: not a manifest: provenance must be a table and context a number")
    return manifest


def verify(directory: Path) -> Manifest:
    """Checks every file of a directory against its manifest; returns the manifest.

    Raises:
        ExportError: a file is missing, changed or not in the manifest; the message names it.
    """
    manifest = verify_sizes(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            found = digest_file(path)
        except OSError as error:
            raise ExportError(f"{path}: cannot be read: {error.strerror}; {MANIFEST} lists it") from error
        if found != entry:
            raise ExportError(
                f"{path}: was changed after the export: SHA-256 {found.sha256[:12]}…, expected {entry.sha256[:12]}…"
            )
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    for name in sorted(present - set(manifest.files) - {MANIFEST}):
        raise ExportError(f"{directory / name}: is not part of the export; {MANIFEST} does not list it")
    return manifest


def verify_sizes(directory: Path) -> Manifest:
    """Checks that every file of a manifest is there in its whole length, without reading it; returns the manifest.

    Raises:
        ExportError: a file is missing, incomplete or longer; the message names it.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise ExportError(f"{path}: cannot be read: {error.strerror}; {MANIFEST} lists it") from error
        if found != entry.bytes:
            shorter = "is incomplete, or " if found < entry.bytes else ""
            raise ExportError(
                f"{path}: {shorter}was changed after the export: {found:,} bytes, expected {entry.bytes:,}"
            )
    return manifest


def manifest_digest(directory: Path) -> str:
    """Returns the SHA-256 of `fedtune.json`; as the manifest has all digests, it identifies the whole directory."""
    return digest_file(directory / MANIFEST).sha256


def _name(name: str) -> str:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name
    if outside or not name.isprintable() or name in ("", ".", MANIFEST):
        raise ValueError(f"{name!r} is not a file's name inside the directory")
    return name


def _entry(value: Mapping[str, Any]) -> FileEntry:
    sha256, size = value["sha256"], value["bytes"]
    if not (isinstance(sha256, str) and len(sha256) == _HEX_DIGITS and isinstance(size, int) and size >= 0):
        raise ValueError("a file's sha256 or bytes is malformed")
    return FileEntry(sha256, size)
