"""The models that a device pulled: one folder for each version, and two names that say which counts.

    models/JOB-FORMAT-DIGEST/     an exported directory, whole and checked
    models/current, previous      symbolic links to two of them
    models/.incoming-VERSION/     what has arrived of a version so far; it has no manifest, so nothing takes it for one

A version gets its name when it is whole, and `current` moves from one version to the other in one step: whoever reads
`models/current`, at whatever moment, finds a whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import ServiceLock, private_folder, sync_directory

CURRENT, PREVIOUS = "current", "previous"
INCOMING = ".incoming-"


class Versions:
    """A device's models.

    Args:
        folder: of all of them; made when the first is pulled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def current(self) -> Path | None:
        """The version that is served; None where none was pulled yet."""
        return self._target(CURRENT)

    @property
    def previous(self) -> Path | None:
        """The version that was current before; None where there is none."""
        previous = self._target(PREVIOUS)
        return None if previous == self.current else previous

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Held by the one process that pulls or switches.

        Raises:
            InputError: another process does.
        """
        private_folder(self.folder)
        with ServiceLock(self.folder / ".lock"):
            yield

    def incoming(self, version: str) -> Path:
        """Where the files of a version that is not whole yet arrive."""
        return private_folder(self.folder / f"{INCOMING}{version}")

    def admit(self, version: str) -> Path:
        """Gives a version that has arrived whole its name."""
        path = self.folder / version
        incoming = self.incoming(version)
        for part in (incoming, *(found for found in incoming.rglob("*") if found.is_dir())):
            sync_directory(part)
        shutil.rmtree(path, ignore_errors=True)  # a version of the same name that was found damaged
        incoming.rename(path)
        sync_directory(self.folder)
        return path

    def switch(self, version: str) -> None:
        """Makes a version the current one, and the current one the previous; what is neither is removed."""
        current = self.current
        if current is not None and current.name != version:
            self._point(PREVIOUS, current.name)
        self._point(CURRENT, version)
        kept = {path.name for path in (self.current, self.previous) if path is not None}
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def roll_back(self) -> Path:
        """Swaps the current version and the previous one.

        Returns:
            The version that is current now.

        Raises:
            InputError: there is no previous one.
        """
        current, previous = self.current, self.previous
        if current is None or previous is None:
            raise InputError(f"{self.folder}: no previous version to go back to; expected two pulled models")
        self._point(CURRENT, previous.name)
        self._point(PREVIOUS, current.name)
        return previous

    def _target(self, name: str) -> Path | None:
        link = self.folder / name
        if not link.is_symlink():
            return None
        path = self.folder / link.readlink().name
        return path if path.is_dir() else None

    def _point(self, name: str, version: str) -> None:
        temporary = self.folder / f".{name}.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(version)
        temporary.replace(self.folder / name)
        sync_directory(self.folder)
