"""The fleet owner's folder, on a machine of the owner's own: it holds the one key that a server must never have.

fleet.key       signs the fleet's log, job manifests and exported models
next.key        the key that takes its place, while `fedtune fleet rotate` is under way
fleet.jsonl     the fleet's log
release.json    the last release of a model, after whose number the next one's comes

A backup of this folder is a backup of the fleet. Where it lies on the server's machine, for a try-out, the server's
process does not read it; but whoever breaks into that machine can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedtune.core.errors import InputError, PeerError
from fedtune.core.host.private_files import check_private, private_folder, read_bounded, write_private
from fedtune.core.manifest.fleet_log import DAYS, MAX_LOG_BYTES, Change, Fleet, append, replay
from fedtune.core.manifest.joining import JoinRequest, read_public
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.model_requests import MAX_RELEASE_BYTES
from fedtune.core.secagg.identity import Identity

ENVIRONMENT = "FEDTUNE_FLEET_HOME"
_KEY, _NEXT, _FIRST, _LOG, _RELEASE = "fleet.key", "next.key", "fleet.pub", "fleet.jsonl", "release.json"
_DAY = 86_400.0

Check = Callable[[bytes], object]
"""Raises InputError for a release's bytes that no server would take."""


def default_home() -> Path:
    """Returns the default folder of a fleet's owner."""
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".fedtune" / "fleet")


class OwnerHome:
    """The existing folder of a fleet's owner.

    Args:
        now: returns seconds since 1970.

    Raises:
        InputError: there is none, or other users have access to it.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        if not (path / _KEY).is_file():
            raise InputError(f"{path}: there is no fleet here; make one with: fedtune fleet init")
        check_private(path)
        self.path, self._now = path, now

    @classmethod
    def create(cls, path: Path, now: Callable[[], float] = time.time) -> OwnerHome:
        """Makes an owner's folder with a new key, and a log whose first entry has no devices.

        Raises:
            InputError: there is one already.
        """
        if (path / _KEY).exists():
            raise InputError(f"{path}: there is a fleet here already")
        private_folder(path)
        key = Identity.generate()
        write_private(path / _FIRST, key.public.hex() + "\n")
        key.save(path / _KEY)
        made = cls(path, now)
        made.change(Change())
        return made

    @property
    def key(self) -> Identity:
        """The key in force."""
        fleet, key = self.fleet, Identity.load(self.path / _KEY)
        if key.public != fleet.key and (self.path / _NEXT).exists():  # a rotation was cut off after its entry
            key = Identity.load(self.path / _NEXT)
            key.save(self.path / _KEY)
        return key

    @property
    def first_key(self) -> bytes:
        """The first public key, which servers and devices pin."""
        return read_public(self.path / _FIRST)

    @property
    def log(self) -> bytes:
        """The fleet's log."""
        path = self.path / _LOG
        return read_bounded(path, "the fleet's log", MAX_LOG_BYTES) if path.exists() else b""

    @property
    def fleet(self) -> Fleet:
        """The fleet after the log's last entry.

        Raises:
            InputError: the log is damaged.
        """
        try:
            return replay(self.log, self.first_key)
        except PeerError as error:
            raise InputError(f"{self.path / _LOG}: {error}") from None

    def change(self, change: Change, days: float = DAYS) -> Fleet:
        """Appends an entry to the log.

        Args:
            days: how long devices trust the log without a newer entry.

        Raises:
            InputError: the change contradicts the fleet.
        """
        try:
            log, fleet = append(self.log, self.fleet, self.key, change, self._now() + days * _DAY)
        except PeerError as error:
            raise InputError(str(error)) from None
        write_private(self.path / _LOG, log)
        return fleet

    def approve(self, requests: Sequence[JoinRequest], days: float = DAYS) -> Fleet:
        """Approves devices, in one entry."""
        return self.change(Change({request.name: request.keys for request in requests}), days)

    def revoke(self, names: Sequence[str], days: float = DAYS) -> Fleet:
        """Revokes devices, in one entry."""
        return self.change(Change(revoked=tuple(names)), days)

    def release(
        self, name: str, models: Mapping[str, str], days: float = DAYS, check: Check | None = None
    ) -> ModelRelease:
        """Signs a release of a job's model, under the number after the last release's.

        Args:
            models: format -> SHA-256 of the export's manifest, in hexadecimal digits.
            days: how long devices may install it.
            check: raises InputError for a release that its server would refuse; the number is then still free.

        Raises:
            InputError: the job's name is none, the last release's file is damaged, or the check refuses the release.
        """
        path = self.path / _RELEASE
        try:
            last = (
                ModelRelease.unchecked(read_bounded(path, "the last release", MAX_RELEASE_BYTES)).number
                if path.exists()
                else 0
            )
            release = ModelRelease.sign(self.key, last + 1, name, models, self._now() + days * _DAY)
        except PeerError as error:
            raise InputError(f"{path}: {error}") from None
        if check is not None:
            check(release.data)
        write_private(path, release.data)
        return release

    def rotate(self, days: float = DAYS) -> Fleet:
        """Replaces the key: the old one signs an entry that names the new one. Manifests and models must be signed
        again."""
        following = Identity.generate()
        following.save(self.path / _NEXT)
        self.change(Change(next_key=following.public), days)
        following.save(self.path / _KEY)
        (self.path / _NEXT).unlink()
        return self.fleet
