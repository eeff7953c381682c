"""Runs from Python: jobs with sections as arguments, simulations on data in memory, finished runs and their models."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtune.api.frames import COLUMNS, rounds_frame
from fedtune.api.rows import Rows, write_clients, write_rows
from fedtune.core.errors import InputError
from fedtune.core.job import job_file
from fedtune.core.job.settings import Job
from fedtune.core.round_records import RoundRecord
from fedtune.server.custom_metrics import AnswerMetric, CustomMetrics
from fedtune.server.export.request import ONNX, ExportOptions, ExportRequest
from fedtune.server.export.request import export as export_run
from fedtune.server.run_directory import JOB, REPORT, check_free, read_rounds, read_summary
from fedtune.server.run_display import Display, Silent
from fedtune.server.simulation.simulate import resume as resume_job
from fedtune.server.simulation.simulate import simulate as simulate_job


@dataclass(frozen=True)
class Run:
    """A run on disk, finished or not.

    Args:
        path: its directory.
    """

    path: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json.

        Raises:
            RunDirectoryError: the run has not finished.
        """
        return read_summary(self.path)

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, as PEFT loads it."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / REPORT

    def rounds(self) -> Any:
        """Returns the rounds so far as a pandas DataFrame; see `rounds_frame`."""
        return rounds_frame(read_rounds(self.path))


def load_job(path: str | Path | None = None, **sections: Mapping[str, Any]) -> Job:
    """Reads a job file, with keys of its sections replaced.

    Args:
        path: the job file; None for the defaults, which are the bundled demo.
        sections: section -> its keys, such as training={"local_steps": 5}.

    Raises:
        JobError: the job has problems; the error lists all of them.
    """
    overrides = [
        f"{section}.{key}={json.dumps(list(value) if isinstance(value, tuple) else value)}"
        for section, keys in sections.items()
        for key, value in keys.items()
    ]
    return job_file.load_job(Path(path) if path is not None else None, overrides)


def simulate(
    job: Job,
    out: str | Path,
    *,
    clients: Mapping[str, Rows] | None = None,
    evaluation: Rows | None = None,
    metrics: Mapping[str, AnswerMetric] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    display: Display | None = None,
    force: bool = False,
) -> Run:
    """Simulates a federation in this process and its forks.

    Args:
        out: the directory of the new run.
        clients: name -> the client's rows, in place of the job's training data; written into a folder beside `out`
            whose name ends in "-data".
        evaluation: the server's held-out rows, in place of the job's.
        metrics: name -> a function (prompt, expected, answer) -> float of your own. Every evaluation by the server
            generates answers to its held-out prompts, of at most evaluation.answer_tokens tokens, and has each
            function's mean beside loss and exact match: in `RoundRecord.eval.custom`, `Run.rounds()`, summary and
            report. Each is tried once before training. Prompts are as the model sees them, without special tokens.
        on_round: called with the record of every round, when it is on the disk; what it raises ends the run, which can
            be resumed.
        display: told of the run's events beside that; None for silence.
        force: replace the run, and the data folder, that are there.

    Raises:
        InputError: the job, its data, its model or a metric cannot be used, or the path is taken; nothing was trained.
        RunError: the run could not go on, such as where a metric fails on an example; it can be resumed.
    """
    path, custom = Path(out), _custom(metrics)
    check_free(path, force)
    if clients is not None or evaluation is not None:
        job = _with_data(job, path.with_name(f"{path.name}-data"), clients, evaluation, force)
    simulate_job(job, path, _Calls(display or Silent(), on_round), force=force, metrics=custom)
    return Run(path)


def resume(
    run: Run,
    *,
    metrics: Mapping[str, AnswerMetric] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    display: Display | None = None,
) -> Run:
    """Goes on with an interrupted simulation, to the result of one that was not interrupted, and returns the run.

    Args:
        metrics: as for `simulate`; a run does not keep functions.
        on_round: as for `simulate`, with the remaining rounds.
        display: as for `simulate`.

    Raises:
        InputError: the run or a metric cannot be used.
        RunError: the run could not go on.
    """
    resume_job(run.path, _Calls(display or Silent(), on_round), metrics=_custom(metrics))
    return Run(run.path)


def load_run(path: str | Path) -> Run:
    """Returns the run in a directory.

    Raises:
        InputError: there is none.
    """
    if not (Path(path) / JOB).is_file():
        raise InputError(f"{path}: not a run directory; expected a {JOB} in it")
    return Run(Path(path))


def export(run: Run, form: str = "int4", out: str | Path | None = None) -> Path:
    """Exports a finished run's model, and returns its folder; an earlier one at the path is replaced.

    Args:
        form: "int4", "int8", "fp16" or "fp32".
        out: the folder of all formats; the run's own by default.

    Raises:
        InputError: the run cannot be exported.
        RunError: the model differs too much from the merged one in this format.
    """
    request = ExportRequest(run.path, (form,), Path(out) if out else run.path / ONNX, ExportOptions(force=True))
    (done,) = export_run(request, Silent())
    return done.path


def _custom(metrics: Mapping[str, AnswerMetric] | None) -> CustomMetrics:
    return CustomMetrics(metrics or {}, taken=("round", *COLUMNS))


def _with_data(job: Job, folder: Path, clients: Mapping[str, Rows] | None, evaluation: Rows | None, force: bool) -> Job:
    """Writes the rows into a folder, and returns the job that reads them."""
    if folder.exists():
        if not force:
            raise InputError(f"{folder}: exists already; choose another `out`, or replace both with force=True")
        shutil.rmtree(folder)
    data = job.data
    if clients is not None:
        data = dataclasses.replace(data, train=write_clients(clients, folder / "clients"), partition="by-file")
    if evaluation is not None:
        folder.mkdir(parents=True, exist_ok=True)
        data = dataclasses.replace(data, evaluation=str(write_rows(evaluation, folder / "evaluation.jsonl")))
    return dataclasses.replace(job, data=data)


class _Calls:
    """A display that calls a function after every round, and passes all events on to another display."""

    def __init__(self, display: Display, on_round: Callable[[RoundRecord], None] | None) -> None:
        self._display, self._on_round = display, on_round

    def __getattr__(self, name: str) -> Any:
        return getattr(self._display, name)

    def round(self, record: RoundRecord) -> None:
        self._display.round(record)
        if self._on_round is not None:
            self._on_round(record)
