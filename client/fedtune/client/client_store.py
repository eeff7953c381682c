"""The state that a client keeps between rounds, across crashes and restarts: its residuals, and received adapters.

A residual belongs to a round. When the server repeats a round, because it crashed before the round was acknowledged,
the client goes on from the residual that it had before that round; so the last few are kept.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec import ExactCodec, Residual
from fedtune.core.codec.downlink import REMEMBERED_VERSIONS
from fedtune.core.errors import PeerError

KEPT_RESIDUALS = 3  # per factor: the one in use, and those of the rounds that a server may still repeat
TEMPORARY = ".tmp"
_NAME_LENGTH = 24


class ClientStore:
    """Files in one folder, each written whole or not at all.

    Args:
        folder: folder of one job; created when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def residual(self, client: str, factor: str, count: int, before_round: int) -> Residual:
        """Returns a client's residual of a factor before a round; empty for a new client or a damaged file."""
        paths = [path for path in self._residuals(client, factor) if int(path.stem) < before_round]
        if not paths:
            return Residual.empty(count)
        try:
            return Residual.from_bytes(paths[-1].read_bytes(), count)
        except (OSError, PeerError):
            return Residual.empty(count)

    def residual_round(self, client: str, factor: str, before_round: int) -> int:
        """Returns the round after which `residual` was kept; 0 where there is none."""
        rounds = [int(path.stem) for path in self._residuals(client, factor)]
        return max((number for number in rounds if number < before_round), default=0)

    def keep_residual(self, client: str, factor: str, round_number: int, residual: Residual) -> None:
        """Stores a client's residual of a factor after a round."""
        folder = self._residual_folder(client, factor)
        _write(folder / f"{round_number:08d}", residual.to_bytes())
        for stale in self._residuals(client, factor):
            if int(stale.stem) > round_number:
                stale.unlink(missing_ok=True)
        for old in self._residuals(client, factor)[:-KEPT_RESIDUALS]:
            old.unlink(missing_ok=True)

    def adapter(self, digest: str, count: int) -> Vector | None:
        """Returns a version of the adapter that this device has received, or None."""
        try:
            return ExactCodec().decode((self._folder / "adapters" / digest).read_bytes(), count)
        except (OSError, PeerError):
            return None

    def keep_adapter(self, digest: str, adapter: Vector) -> None:
        """Stores a version of the adapter, and removes the oldest ones."""
        folder = self._folder / "adapters"
        path = folder / digest
        if path.exists():
            os.utime(path)
            return
        _write(path, ExactCodec().encode(adapter))
        versions = sorted((entry for entry in folder.iterdir() if len(entry.name) == len(digest)), key=_age)
        for old in versions[: -2 * REMEMBERED_VERSIONS]:
            old.unlink(missing_ok=True)

    def _residual_folder(self, client: str, factor: str) -> Path:
        # Names may contain any character, including a path separator.
        name = hashlib.sha256(client.encode()).hexdigest()[:_NAME_LENGTH]
        return self._folder / "residuals" / name / factor

    def _residuals(self, client: str, factor: str) -> list[Path]:
        folder = self._residual_folder(client, factor)
        return sorted(path for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another worker has just removed it
        return 0.0


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
