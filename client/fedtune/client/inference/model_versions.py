"""The pulled models of a device: one folder for each version, and links to the current and the previous one.

    models/JOB-FORMAT-DIGEST/     an exported directory, whole and checked
    models/current, previous      symbolic links to two of them
    models/release.json           the owner's release that was installed last, below which none is installed again
    models/.incoming-VERSION/     the received part of a version; without a manifest, so that it cannot be loaded

A version gets its name when it is whole, and `current` moves between versions atomically: a reader of `models/current`
always finds a whole model. The edge packs of each base model are kept in the same way, in packs/NAME.

The device's own owner may go back to the previous version. That leaves the last release as it is: what a server offers
must still be that one or a newer one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.core.errors import InputError, PeerError
from fedtune.core.host.private_files import ServiceLock, private_folder, read_bounded, sync_directory, write_private
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.model_requests import MAX_RELEASE_BYTES

CURRENT, PREVIOUS = "current", "previous"
RELEASE = "release.json"
INCOMING = ".incoming-"


class Versions:
    """A device's models.

    Args:
        folder: folder of all versions; created by the first pull.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def current(self) -> Path | None:
        """The version that is served; None before the first pull."""
        return self._target(CURRENT)

    @property
    def previous(self) -> Path | None:
        """The version that was current before; None where there is none."""
        previous = self._target(PREVIOUS)
        return None if previous == self.current else previous

    @property
    def release(self) -> ModelRelease | None:
        """The release that was installed last; None before the first.

        Raises:
            InputError: its file is damaged.
        """
        path = self.folder / RELEASE
        if not path.exists():
            return None
        try:
            return ModelRelease.unchecked(read_bounded(path, "the installed release", MAX_RELEASE_BYTES))
        except PeerError as error:
            raise InputError(f"{path}: {error}; leave the fleet and join again, to begin without models") from None

    def check_newer(self, release: ModelRelease) -> None:
        """Refuses a release from before the one that was installed last.

        Raises:
            PeerError: it has a lower number, or the same number and another content.
        """
        last = self.release
        if last is None or release.number > last.number or release.data == last.data:
            return
        raise PeerError(
            f"the server offers release {release.number}, {release.name}, and this device has installed release "
            f"{last.number}, {last.name}; the fleet's owner may release that model again with: fedtune fleet publish"
        )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Holds the lock of the one process that may pull or switch.

        Raises:
            InputError: another process holds it.
        """
        private_folder(self.folder)
        with ServiceLock(self.folder / ".lock"):
            yield

    def incoming(self, version: str) -> Path:
        """Returns the folder that receives the files of an incomplete version."""
        return private_folder(self.folder / f"{INCOMING}{version}")

    def admit(self, version: str) -> Path:
        """Gives its name to a version that is complete."""
        path = self.folder / version
        incoming = self.incoming(version)
        for part in (incoming, *(found for found in incoming.rglob("*") if found.is_dir())):
            sync_directory(part)
        shutil.rmtree(path, ignore_errors=True)  # a damaged version of the same name
        incoming.rename(path)
        sync_directory(self.folder)
        return path

    def install(self, version: str, release: ModelRelease) -> None:
        """Makes a released version the current one, and the current one the previous; removes all others."""
        write_private(self.folder / RELEASE, release.data)  # before the link moves: a crash forgets no release
        sync_directory(self.folder)
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
            The version that is now current.

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
