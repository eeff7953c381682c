"""The run directory: all files that a run leaves, readable without fedtune, consistent after a crash at any instant.

    job.toml              the job as resolved, with the base model's digest
    rounds.jsonl          one object a round, appended and fsynced
    checkpoints/NNNNNN/   the state after round N: enough to go on bit for bit
    adapter/              in PEFT format
    summary.json          the final figures
    virtual.jsonl         one object a round of a simulated fleet
    report.html           self-contained
    profile.txt           where the time went, if it was measured
    trace.json            the same for a viewer of traces
    tracking/             how far each experiment tracker has been told

A round is acknowledged when its checkpoint appears. Its line in rounds.jsonl is written just before; a line beyond the
newest checkpoint belongs to a round that a crash cut off, and is removed when the run is resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedtune.core.adapter.adapter_files import save_adapter
from fedtune.core.adapter.layout import AdapterLayout, adapter_digest
from fedtune.core.errors import JobError, RunDirectoryError, RunError
from fedtune.core.job.contradictions import contradictions
from fedtune.core.job.job_file import dump_job, recorded_job
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Rebasing
from fedtune.core.round_records import Evaluation, RoundRecord
from fedtune.server.run_files import append_line, new_directory, storage, write_json, write_text
from fedtune.strategies.aggregation.evidence import Evidence
from fedtune.strategies.cohorts.suspicion import Suspicion
from fedtune.strategies.federation import FederationState

JOB = "job.toml"
ROUNDS = "rounds.jsonl"
FINISHED, FAILED, CANCELLED = "finished", "failed", "cancelled"  # values of the summary's status
SUMMARY = "summary.json"
VIRTUAL = "virtual.jsonl"  # only if a fleet is simulated
REPORT = "report.html"
PROFILE, TRACE = "profile.txt", "trace.json"  # only of a profiled simulation
ADAPTER = "adapter"
CLIENTS = "clients"  # the state that a simulation's clients keep between rounds
CHECKPOINTS = "checkpoints"
KEPT_CHECKPOINTS = 2
_LOCK = ".lock"
_STATE = "state.json"
_TENSORS = "state.safetensors"
_SERVER = "server."  # prefix of the state of aggregator and server optimizer
_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """The state from which a run can be resumed.

    Args:
        state: the federation's state after `state.round` rounds.
        base_digest: the digest of the adapter's base model.
        terms_digest: the digest of the job's terms, from which all random numbers of its clients follow.
        seconds: time spent on the run so far, over all its processes.
        eval_before: evaluation of the untrained adapter, if the job has evaluation data.
        answers_before: the display prompts' answers before training.
    """

    state: FederationState
    base_digest: str
    terms_digest: str
    seconds: float
    eval_before: Evaluation | None
    answers_before: tuple[str, ...] = ()


class RunDirectory:
    """One run's directory, locked for this process until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = (path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunDirectoryError(f"{path}: another process works on this run") from error

    @classmethod
    def create(cls, path: Path, job: Job, base_digest: str, force: bool = False) -> RunDirectory:
        """Creates the directory of a new run.

        Args:
            force: empty an earlier run's directory first; anything else at the path is still refused.

        Raises:
            RunDirectoryError: the path is taken.
        """
        if not check_free(path, force):
            shutil.rmtree(path)
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
            directory = cls(path)
            (path / CHECKPOINTS).mkdir()
            write_text(path / JOB, f"# base_digest = {base_digest}\n\n{dump_job(job)}")
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Opens an existing run.

        Raises:
            RunDirectoryError: the path is not a run directory, or another process works on it.
        """
        if not (path / JOB).is_file():
            raise RunDirectoryError(f"{path}: not a run directory; expected a {JOB} in it")
        return cls(path)

    def close(self) -> None:
        """Releases the run's lock, so that other processes can work on it."""
        self._lock.close()

    def job(self) -> Job:
        """Reads the job as it was resolved when the run began.

        Raises:
            JobError: this release does not permit it, and so cannot go on with the run.
        """
        job = recorded_job(self.path / JOB)
        if problems := contradictions(job):
            begun = "the run was begun by a release that permitted it. Go on with that one, or begin a new run"
            raise JobError([f"{problem}; {begun}" for problem in problems], self.path / JOB)
        return job

    def acknowledge(self, checkpoint: Checkpoint, record: RoundRecord | None) -> None:
        """Writes a round's record and checkpoint; `record` is None for the state before round 1."""
        state = checkpoint.state
        with storage(self.path):
            if record is not None:
                append_line(self.path / ROUNDS, json.dumps(record.to_json(), allow_nan=False))
            with new_directory(self._checkpoint_path(state.round)) as directory:
                kept = {f"{_SERVER}{name}": np.ascontiguousarray(value) for name, value in state.server.items()}
                save_file({"adapter": state.adapter, "held": state.held, **kept}, directory / _TENSORS)
                write_json(
                    directory / _STATE,
                    {
                        "round": state.round,
                        "adapter_digest": adapter_digest(state.adapter),
                        "held_digest": adapter_digest(state.held),
                        "server_digests": {name: adapter_digest(value) for name, value in kept.items()},
                        "clips": state.clips,
                        "stale_updates": {name: b64encode(data).decode() for name, data in state.stale_updates.items()},
                        "suspicion": state.suspicion.to_json(),
                        "evidence": state.evidence.to_json(),
                        "rebasing": msgspec.structs.asdict(state.rebasing) if state.rebasing else None,
                        "base_digest": checkpoint.base_digest,
                        "terms_digest": checkpoint.terms_digest,
                        "seconds": checkpoint.seconds,
                        "eval_before": asdict(checkpoint.eval_before) if checkpoint.eval_before else None,
                        "answers_before": list(checkpoint.answers_before),
                    },
                )
            for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(self._checkpoint_path(old))

    def restore(self) -> Checkpoint | None:
        """Returns the newest whole checkpoint and cuts rounds.jsonl back to it; returns None if the run has none yet.

        Raises:
            RunError: there are checkpoints, but none is whole.
        """
        numbers = self._checkpoints()
        for number in reversed(numbers):
            checkpoint = self._load(number)
            if checkpoint is not None:
                lines = [json.dumps(line, allow_nan=False) for line in self.rounds() if line["round"] <= number]
                with storage(self.path):
                    write_text(self.path / ROUNDS, "".join(line + "\n" for line in lines))
                return checkpoint
        if numbers:
            remedy = "go on with the release that wrote them, or begin a new run"
            raise RunError(f"{self.path / CHECKPOINTS}: no checkpoint is whole, or of this release; {remedy}")
        return None

    def rounds(self) -> list[dict[str, Any]]:
        """Reads the objects of rounds.jsonl; a last line that a crash cut off is left out."""
        return read_rounds(self.path)

    def save_adapter(self, layout: AdapterLayout, state: FederationState, base: str) -> Path:
        """Writes adapter/ in PEFT format."""
        with storage(self.path), new_directory(self.path / ADAPTER) as directory:
            save_adapter(directory, layout, state.adapter, base)
        return self.path / ADAPTER

    def earlier_peak_mb(self) -> float:
        """Returns the peak memory in MB in an earlier summary; 0 if there is none."""
        return float(read_summary(self.path)["peak_rss_mb"]) if is_finished(self.path) else 0.0

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        with storage(self.path):
            write_json(self.path / SUMMARY, summary)

    def _checkpoint_path(self, number: int) -> Path:
        return self.path / CHECKPOINTS / f"{number:06d}"

    def _checkpoints(self) -> list[int]:
        return sorted(int(path.name) for path in (self.path / CHECKPOINTS).glob("[0-9]*") if path.name.isdigit())

    def _load(self, number: int) -> Checkpoint | None:
        directory = self._checkpoint_path(number)
        try:
            text = json.loads((directory / _STATE).read_text(encoding="utf-8"))
            tensors = load_file(directory / _TENSORS)
            adapter, held = (tensors[name].astype(np.float32, copy=False) for name in ("adapter", "held"))
            digests = (adapter_digest(adapter), adapter_digest(held))
            if digests != (text["adapter_digest"], text["held_digest"]) or text["round"] != number:
                return None
            kept = {name: tensor for name, tensor in tensors.items() if name.startswith(_SERVER)}
            if {name: adapter_digest(value) for name, value in kept.items()} != text["server_digests"]:
                return None
            server = {name.removeprefix(_SERVER): value for name, value in kept.items()}
            return Checkpoint(
                FederationState(
                    number,
                    adapter,
                    held,
                    text["clips"],
                    server,
                    {name: b64decode(data) for name, data in text["stale_updates"].items()},
                    Rebasing(**text["rebasing"]) if text["rebasing"] else None,
                    Suspicion.from_json(text["suspicion"]),
                    Evidence.from_json(text["evidence"]),
                ),
                text["base_digest"],
                text.get("terms_digest", ""),
                float(text["seconds"]),
                Evaluation(**text["eval_before"]) if text["eval_before"] else None,
                tuple(text["answers_before"]),
            )
        except _DAMAGE:
            return None


def check_free(path: Path, force: bool = False) -> bool:
    """Returns whether the path is free; with `force`, an earlier run may be there.

    Raises:
        RunDirectoryError: the path is taken, or a process still works on the run that `force` would replace.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return True
    is_run = (path / JOB).is_file() or (path / _LOCK).is_file()
    if not force or not is_run:
        advice = "choose another --out, or replace it with --force" if is_run else "it is not a run directory"
        raise RunDirectoryError(f"{path}: exists already; {advice}")
    RunDirectory(path).close()
    return False


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a run's rounds.jsonl without the run's lock."""
    try:
        text = (path / ROUNDS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = text.split("\n")[:-1]  # text after the last line break is empty, or was cut off by a crash
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path / ROUNDS}: not one JSON object a line: {error}") from error


def read_eval_before(path: Path) -> dict[str, Any] | None:
    """Reads the untrained adapter's evaluation from a run's newest checkpoint; None if there is none."""
    for checkpoint in sorted((path / CHECKPOINTS).glob("[0-9]*"), reverse=True):
        try:
            before: dict[str, Any] | None = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["eval_before"]
        except _DAMAGE:  # or replaced by a newer one meanwhile
            continue
        return before
    return None


def read_virtual(path: Path) -> list[dict[str, Any]]:
    """Reads the rounds that a simulated fleet has logged, if there is one. A line that a crash cut off is left out."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path}: not one JSON object a line: {error}") from error


def is_finished(path: Path) -> bool:
    """Returns whether all rounds are done and all their files are written."""
    return (path / SUMMARY).is_file() and bool(read_summary(path)["status"] == FINISHED)


def file_digests(path: Path, files: Iterable[Path]) -> dict[str, str]:
    """Returns the SHA-256 of files of a run: path within the run directory -> hexadecimal digits."""
    found = {}
    for file in files:
        with file.open("rb") as content:
            found[str(file.relative_to(path))] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def read_summary(path: Path) -> dict[str, Any]:
    """Reads a run's summary.json.

    Raises:
        RunDirectoryError: the file is missing or cannot be read.
    """
    try:
        summary: dict[str, Any] = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path}: no {SUMMARY}; the run has not finished. Go on with: fedtune resume {path}"
        ) from error
    except (OSError, json.JSONDecodeError) as error:
        raise RunDirectoryError(f"{path / SUMMARY}: cannot be read: {error}") from error
    return summary
