"""The log of what a client has served of each job, across restarts: without it, an update could be summed twice.

A record is written before the message that makes it true leaves. Nothing in a log is ever forgotten, since a manifest
that has expired may be signed again: a log that is full refuses, and stays as it is. Live devices know a job by the
digest of terms that the fleet's owner has signed, so that no server can fill one by itself.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import read_bounded, sync_directory, write_private
from fedtune.core.secagg.exchanged import MAX_COUNTER

MAX_LOG_BYTES = 4 << 20
_GROWTH = 72  # bytes by which the numbers of one job may grow


class RoundMark(NamedTuple):
    """The number of a round and of an attempt at it; later marks compare greater."""

    round: int
    attempt: int


class Served(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part that a client has had in one job.

    Attributes:
        last: the last attempt that it has answered.
        sums: rounds for which it has masked an update.
        survivors: sets of survivors, by name, whose sum it has voted for; the last one at the end.
        rho: ρ that its updates have spent under differential privacy, as `fedtune.core.privacy.guarantee` has it.
    """

    last: RoundMark = RoundMark(-1, 0)
    sums: int = 0
    survivors: tuple[tuple[str, ...], ...] = ()
    rho: float = 0.0

    def opened(self, mark: RoundMark) -> Served:
        """Returns the record after the first answer to an attempt."""
        return msgspec.structs.replace(self, last=mark)

    def masked(self, number: int, rho: float = 0.0) -> Served:
        """Returns the record after an update was masked for a round, which closes all attempts at it.

        Args:
            rho: ρ that the update spends, whether a sum comes of it or not.
        """
        mark = RoundMark(number, MAX_COUNTER)
        return msgspec.structs.replace(self, last=mark, sums=self.sums + 1, rho=self.rho + rho)

    def voted(self, survivors: Set[str], keep: bool) -> Served:
        """Returns the record after a vote for a set of survivors.

        Args:
            keep: whether the earlier sets stay; a client whose policy has no `min_difference` needs the last one alone.
        """
        listed = tuple(sorted(survivors))
        earlier = tuple(each for each in self.survivors if each != listed) if keep else ()
        return msgspec.structs.replace(self, survivors=(*earlier, listed))


class RoundLog(Protocol):
    """The records of a client, by job."""

    def of(self, job: str) -> Served:
        """Returns the record of a job, empty before its first round."""

    def record(self, job: str, served: Served) -> None:
        """Replaces the record of a job; a log on disk must be written before this returns."""

    @property
    def rho(self) -> float:
        """ρ that the client has spent in all jobs together."""


class MemoryRoundLog:
    """A round log in memory, for clients that exist only as long as their process, in simulations and tests."""

    def __init__(self) -> None:
        self._jobs: dict[str, Served] = {}

    def of(self, job: str) -> Served:
        return self._jobs.get(job, Served())

    def record(self, job: str, served: Served) -> None:
        self._jobs[job] = served

    @property
    def rho(self) -> float:
        return sum(served.rho for served in self._jobs.values())


class FileRoundLog:
    """A round log in one JSON file, replaced atomically; a crash leaves the old or the new one.

    A file that cannot be read is an error, never an empty log, since a forgotten round would help an attacker.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, job: str) -> Served:
        return self._read().get(job, Served())

    def record(self, job: str, served: Served) -> None:
        jobs = self._read()
        grows = job not in jobs or jobs[job].survivors != served.survivors
        jobs[job] = served
        content = msgspec.json.encode(jobs) + b"\n"
        if grows and len(content) + _GROWTH * len(jobs) > MAX_LOG_BYTES:
            raise InputError(
                f"{self._path}: the log of served rounds is full after {len(jobs)} jobs, and forgets none; to take "
                "part in more, join a new fleet"
            )
        write_private(self._path, content)
        sync_directory(self._path.parent)

    @property
    def rho(self) -> float:
        return sum(served.rho for served in self._read().values())

    def _read(self) -> dict[str, Served]:
        if not self._path.exists():
            return {}
        try:
            return msgspec.json.decode(read_bounded(self._path, "a round log", MAX_LOG_BYTES), type=dict[str, Served])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                f"{self._path}: a round log is one JSON object of job to what was served of it: {error}"
            ) from None
