"""The jobs of a server: files that move from waiting to finished or failed, and a run directory for each.

    jobs/waiting/NNNNNN-NAME.toml       the oldest is in progress while the server runs
    jobs/waiting/NNNNNN-NAME.manifest   the job as the fleet's owner has signed it
    jobs/finished/, jobs/failed/        with the reason in NNNNNN-NAME.txt

To submit a job is to write a file, so it works while the server is down, and needs permission to write to the folder.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune.core.errors import InputError, PeerError
from fedtune.core.host.private_files import private_folder, read_bounded, write_private
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.protocol.registration import MAX_MANIFEST_BYTES
from fedtune.server.live.server_home import ServerHome

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STATES = ("waiting", "finished", "failed")
MANIFEST = ".manifest"
_FILE = re.compile(r"([0-9]{6})-(.+)\.toml")


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or is in progress."""

    number: int
    name: str
    path: Path

    def load(self) -> Job:
        """Reads the job."""
        return load_job(self.path)

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
        for state in _STATES:
            private_folder(self._root / state)

    def submit(self, job: Job, manifest: JobManifest) -> QueuedJob:
        """Puts a job at the end of the queue, under its manifest's name.

        A job that waits, or is interrupted, and comes again under its name and on its terms keeps its place, and its
        manifest is replaced: after the fleet's key was rotated, or the manifest expired, its owner signs it again.

        Raises:
            InputError: the name is invalid, a run of that name exists, or a job on the same terms was submitted before.
        """
        name = manifest.name
        if not _NAME.fullmatch(name):
            raise InputError(f"{name[:80]!r}: a job's name has 1 to 64 letters, digits, '.', '_' or '-'")
        same = self._on_same_terms(manifest.terms.digest)
        if same in self.waiting() and same.name == name:
            write_private(same.path.with_suffix(MANIFEST), manifest.data)
            return same
        if name in self._names():
            raise InputError(f"{name}: a job of this name was submitted before; choose another with --name")
        if same is not None:
            raise InputError(
                f"{name}: job {same.name} has the same terms, and devices serve a job once; to run it again: "
                f"--set federation.run={manifest.terms.job.federation.run + 1}"
            )
        number = max((entry.number for state in _STATES for entry in self._in(state)), default=0)
        path = self._root / "waiting" / f"{number + 1:06d}-{name}.toml"
        write_private(path.with_suffix(MANIFEST), manifest.data)
        write_private(path, dump_job(job))  # last: makes it a job
        return QueuedJob(number + 1, name, path)

    def free_name(self, stem: str) -> str:
        """Returns STEM-1, or the first such name that no job has used."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:50] or "job"
        number, taken = 1, self._names()
        while f"{stem}-{number}" in taken:
            number += 1
        return f"{stem}-{number}"

    def waiting(self) -> list[QueuedJob]:
        """Returns the waiting jobs in the order of submission."""
        return self._in("waiting")

    def failed(self) -> dict[str, str]:
        """Returns the failed jobs: name -> reason."""
        return {entry.name: _reason(entry.path) for entry in self._in("failed")}

    def finished(self) -> list[str]:
        """Returns the names of finished jobs."""
        return [entry.name for entry in self._in("finished")]

    def run_path(self, job: QueuedJob) -> Path:
        """Returns the job's run directory."""
        return self._runs / job.name

    def finish(self, job: QueuedJob) -> None:
        """Moves a finished job out of the queue."""
        self._move(job, self._root / "finished" / job.path.name)

    def fail(self, job: QueuedJob, reason: str) -> None:
        """Moves a failed job out of the queue, and records the reason."""
        target = self._root / "failed" / job.path.name
        write_private(target.with_suffix(".txt"), reason + "\n")
        self._move(job, target)

    def _move(self, job: QueuedJob, target: Path) -> None:
        job.path.replace(target)
        with suppress(FileNotFoundError):
            job.path.with_suffix(MANIFEST).replace(target.with_suffix(MANIFEST))

    def _on_same_terms(self, digest: str) -> QueuedJob | None:
        """Returns a job with these terms, if there is one."""
        for state in _STATES:
            for entry in self._in(state):
                with suppress(InputError, PeerError):  # a job of an earlier release has no manifest
                    if JobManifest.unchecked(entry.manifest()).terms.digest == digest:
                        return entry
        return None

    def _names(self) -> set[str]:
        jobs = {entry.name for state in _STATES for entry in self._in(state)}
        return jobs | {path.name for path in self._runs.iterdir()}

    def _in(self, state: str) -> list[QueuedJob]:
        entries = []
        for path in sorted((self._root / state).iterdir()):
            if match := _FILE.fullmatch(path.name):
                entries.append(QueuedJob(int(match[1]), match[2], path))
        return entries


def _reason(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown reason"
