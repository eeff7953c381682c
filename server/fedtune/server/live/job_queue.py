"""The jobs of a server: files that move from waiting to finished, failed or cancelled, and a run directory for each.

    jobs/waiting/NNNNNN-NAME.toml       the most urgent, and of these the oldest, is in progress while the server runs
    jobs/waiting/NNNNNN-NAME.manifest   the job as the fleet's owner has signed it
    jobs/waiting/NNNNNN-NAME.priority   how urgent it is; 0 without this file
    jobs/waiting/NNNNNN-NAME.cancel     asks for its end
    jobs/finished/, failed/, cancelled/ with time and reason of the end in NNNNNN-NAME.outcome

To submit or to cancel a job is to write a file, so both work while the server is down, and need permission to write to
the folder.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from fedtune.core.errors import InputError, PeerError
from fedtune.core.host.private_files import private_folder, read_bounded, write_private
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.protocol.registration import MAX_MANIFEST_BYTES
from fedtune.server.live.server_home import ServerHome

WAITING, FINISHED, FAILED, CANCELLED = "waiting", "finished", "failed", "cancelled"
MANIFEST = ".manifest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STATES = (WAITING, FINISHED, FAILED, CANCELLED)
_PRIORITY, _CANCEL, _OUTCOME = ".priority", ".cancel", ".outcome"
_FILE = re.compile(r"([0-9]{6})-(.+)\.toml")


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        ended: seconds since 1970; None where it is not known.
        reason: why it failed or was cancelled; "" for a finished job.
    """

    ended: float | None
    reason: str


@dataclass(frozen=True)
class QueuedJob:
    """A job of the server; most of them wait or are in progress.

    Args:
        number: counts all jobs of the server in the order of their submission.
        priority: the larger is worked on first.
    """

    number: int
    name: str
    path: Path
    priority: int = 0

    def load(self) -> Job:
        """Reads the job."""
        return load_job(self.path)

    @property
    def is_cancelled(self) -> bool:
        """Returns whether its end has been asked for."""
        return self.path.with_suffix(_CANCEL).exists()

    def outcome(self) -> Outcome:
        """Returns how it ended; of a job that an earlier release ended nothing is known."""
        try:
            return msgspec.json.decode(self.path.with_suffix(_OUTCOME).read_bytes(), type=Outcome)
        except (OSError, msgspec.DecodeError):
            return Outcome(None, "unknown reason")

    def manifest(self) -> bytes:
        """Reads its signed manifest.

        Raises:
            InputError: there is none.
        """
        return read_bounded(self.path.with_suffix(MANIFEST), "the job's manifest", MAX_MANIFEST_BYTES)


class Jobs:
    """The jobs of one server."""

    def __init__(self, home: ServerHome) -> None:
        self._root = private_folder(home.path / "jobs")
        self._runs = private_folder(home.path / "runs")
        for state in STATES:
            private_folder(self._root / state)

    def submit(self, job: Job, manifest: JobManifest, priority: int = 0) -> QueuedJob:
        """Puts a job at the end of the queue, under its manifest's name.

        A job that waits, or is interrupted, and comes again under its name and on its terms keeps its number, and its
        manifest and priority are replaced: after the fleet's key was rotated, or the manifest expired, its owner signs
        it again.

        Args:
            priority: jobs of a larger one are worked on first.

        Raises:
            InputError: the name is invalid, a run of that name exists, or a job on the same terms was submitted before.
        """
        name = manifest.name
        if not _NAME.fullmatch(name):
            raise InputError(f"{name[:80]!r}: a job's name has 1 to 64 letters, digits, '.', '_' or '-'")
        same = self._on_same_terms(manifest.terms.digest)
        if same is not None and same.name == name and same in self.waiting():
            write_private(same.path.with_suffix(_PRIORITY), f"{priority}\n")
            write_private(same.path.with_suffix(MANIFEST), manifest.data)
            return self._read(same.path)
        if name in self._names():
            raise InputError(f"{name}: a job of this name was submitted before; choose another with --name")
        if same is not None:
            raise InputError(
                f"{name}: job {same.name} has the same terms, and devices serve a job once; to run it again: "
                f"--set federation.run={manifest.terms.job.federation.run + 1}"
            )
        number = max((entry.number for _, entry in self.all()), default=0)
        path = self._root / WAITING / f"{number + 1:06d}-{name}.toml"
        write_private(path.with_suffix(MANIFEST), manifest.data)
        write_private(path.with_suffix(_PRIORITY), f"{priority}\n")
        write_private(path, dump_job(job))  # last: makes it a job
        return self._read(path)

    def free_name(self, stem: str) -> str:
        """Returns STEM-1, or the first such name that no job has used."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:50] or "job"
        number, taken = 1, self._names()
        while f"{stem}-{number}" in taken:
            number += 1
        return f"{stem}-{number}"

    def next(self) -> QueuedJob | None:
        """Returns the job to work on: the most urgent, and of these the oldest.

        A job that began and was cancelled while the server was down comes before all others, so that it ends.
        """
        ending = [entry for entry in self._in(WAITING) if entry.is_cancelled]
        return next(iter([*ending, *self.waiting()]), None)

    def waiting(self) -> list[QueuedJob]:
        """Returns the waiting jobs in the order in which they are worked on, without those that were cancelled."""
        entries = [entry for entry in self._in(WAITING) if not entry.is_cancelled]
        return sorted(entries, key=lambda entry: (-entry.priority, entry.number))

    def failed(self) -> dict[str, str]:
        """Returns the failed jobs: name -> reason."""
        return {entry.name: entry.outcome().reason for entry in self._in(FAILED)}

    def finished(self) -> list[str]:
        """Returns the names of finished jobs."""
        return [entry.name for entry in self._in(FINISHED)]

    def cancelled(self) -> list[str]:
        """Returns the names of cancelled jobs, those included whose run the server has yet to close."""
        ending = [entry for entry in self._in(WAITING) if entry.is_cancelled]
        return [entry.name for entry in (*self._in(CANCELLED), *ending)]

    def all(self) -> list[tuple[str, QueuedJob]]:
        """Returns all jobs by number, each with the name of its folder: waiting, finished, failed or cancelled."""
        entries = [(state, entry) for state in STATES for entry in self._in(state)]
        return sorted(entries, key=lambda pair: pair[1].number)

    def find(self, name: str) -> tuple[str, QueuedJob]:
        """Returns the folder of a job and the job.

        Raises:
            InputError: there is none of this name; the message has the last that there are.
        """
        found = self.all()
        for state, entry in found:
            if entry.name == name:
                return state, entry
        last = ", ".join(entry.name for _, entry in found[-5:])
        known = f"the last are {last}; all: fedtune server jobs" if last else "the server has none yet"
        raise InputError(f"{name[:80]!r}: no job of this name; {known}")

    def cancel(self, name: str) -> QueuedJob:
        """Asks for the end of a job that waits or is in progress.

        Raises:
            InputError: there is no such job, or it has ended.
        """
        state, entry = self.find(name)
        if state != WAITING:
            raise InputError(f"{name}: this job is {state} already; there is nothing to cancel")
        write_private(entry.path.with_suffix(_CANCEL), "")
        return entry

    def run_path(self, job: QueuedJob) -> Path:
        """Returns the job's run directory."""
        return self._runs / job.name

    def finish(self, job: QueuedJob) -> None:
        """Moves a finished job out of the queue."""
        self._move(job, FINISHED, "")

    def fail(self, job: QueuedJob, reason: str) -> None:
        """Moves a failed job out of the queue, and records the reason."""
        self._move(job, FAILED, reason)

    def set_aside(self, job: QueuedJob, reason: str) -> None:
        """Moves a cancelled job out of the queue, and records how far it came."""
        self._move(job, CANCELLED, reason)

    def _move(self, job: QueuedJob, state: str, reason: str) -> None:
        target = self._root / state / job.path.name
        write_private(target.with_suffix(_OUTCOME), json.dumps(asdict(Outcome(time.time(), reason))) + "\n")
        with suppress(FileNotFoundError):  # moved by the server, or by a command, a moment ago
            job.path.replace(target)
        for suffix in (MANIFEST, _PRIORITY):
            with suppress(FileNotFoundError):
                job.path.with_suffix(suffix).replace(target.with_suffix(suffix))
        job.path.with_suffix(_CANCEL).unlink(missing_ok=True)

    def _on_same_terms(self, digest: str) -> QueuedJob | None:
        """Returns a job with these terms, if there is one."""
        for _, entry in self.all():
            with suppress(InputError, PeerError):  # a job of an earlier release has no manifest
                if JobManifest.unchecked(entry.manifest()).terms.digest == digest:
                    return entry
        return None

    def _names(self) -> set[str]:
        return {entry.name for _, entry in self.all()} | {path.name for path in self._runs.iterdir()}

    def _in(self, state: str) -> list[QueuedJob]:
        return [self._read(path) for path in sorted((self._root / state).iterdir()) if _FILE.fullmatch(path.name)]

    def _read(self, path: Path) -> QueuedJob:
        match = _FILE.fullmatch(path.name)
        assert match is not None
        try:
            priority = int(path.with_suffix(_PRIORITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            priority = 0
        return QueuedJob(int(match[1]), match[2], path, priority)
