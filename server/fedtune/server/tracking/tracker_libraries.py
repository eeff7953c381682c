"""The experiment trackers' own libraries, behind one interface: TensorBoard, MLflow and W&B.

    tracker = open_tracker("mlflow", Target(Path("runs/first")))
    tracker.settings({"federation.rounds": 20})
    tracker.log(1, {"eval/loss": 2.5})
    tracker.end("finished", {"summary/seconds": 61.0})

Addresses, accounts and keys are those of each library's own environment variables, and not the job's. All of them work
without a network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedtune.core.errors import MissingExtraError
from fedtune.core.job.settings import TrackerName
from fedtune.server.run_directory import CANCELLED, FAILED, FINISHED
from fedtune.server.tracking.tracked_figures import Setting

PROJECT = "fedtune"  # the experiment or project, where the library's own variable names no other
PACKAGES: Mapping[TrackerName, str] = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
MLFLOW_DATABASE = "mlflow.db"  # beside the run directory, so that the runs of one folder can be compared
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


@dataclass(frozen=True)
class Target:
    """A run as a tracker knows it.

    Args:
        path: the run directory.
        known: the tracker's own name of the run; None if it does not know it yet.
        done: the last round that the tracker has.
    """

    path: Path
    known: str | None = None
    done: int = -1


class ExperimentTracker(Protocol):
    """The interface of experiment trackers. Every method may raise anything, and may never return."""

    @property
    def run(self) -> str:
        """Returns the tracker's own name of the run, by which another process goes on with it."""

    @property
    def shown(self) -> str:
        """Returns where people find the run."""

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Takes the job's settings."""

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a round; 0 is the untrained adapter."""

    def end(self, status: str | None, figures: Mapping[str, float]) -> None:
        """Takes the figures of the whole run, and ends it.

        Args:
            status: the summary's; None for a run that was interrupted.
        """


def check_installed(trackers: Sequence[TrackerName]) -> None:
    """Checks before a run that its trackers can be used.

    Raises:
        MissingExtraError: packages are not installed; the message names all of them.
    """
    if missing := [name for name in dict.fromkeys(trackers) if not _installed(name)]:
        raise MissingExtraError("[tracking]", ",".join(missing), *(PACKAGES[name] for name in missing))


def _installed(name: TrackerName) -> bool:
    spec = find_spec(PACKAGES[name])
    return spec is not None and spec.origin is not None  # a folder of this name, such as W&B's ./wandb, has no origin


def open_tracker(name: TrackerName, target: Target) -> ExperimentTracker:
    """Opens a tracker for a run, to begin it or to go on with it."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if name == "tensorboard":
        return TensorBoard(target)
    return MLflow(target) if name == "mlflow" else WandB(target)


class TensorBoard:
    """Event files in the run directory's tensorboard/, which `tensorboard --logdir` reads."""

    def __init__(self, target: Target) -> None:
        board = import_module("torch.utils.tensorboard")
        self._hparams = import_module("torch.utils.tensorboard.summary").hparams
        self.run = "tensorboard"
        folder = target.path / self.run
        self.shown = f"tensorboard --logdir {target.path.parent}"
        # Rounds that an earlier process wrote just before it was killed are replaced.
        self._writer = board.SummaryWriter(str(folder), purge_step=target.done + 1)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Writes them for the HParams page, beside the columns of the main figures."""
        columns = ("eval/loss", "eval/exact_match", "summary/bytes_up", "summary/bytes_down", "summary/seconds")
        for part in self._hparams(dict(values), dict.fromkeys(columns, 0.0)):
            self._writer.file_writer.add_summary(part)
        self._writer.flush()

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Writes one scalar for each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def end(self, status: str | None, figures: Mapping[str, float]) -> None:
        """Writes the run's figures as scalars of one point each."""
        del status
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round(figures["summary/rounds"]))
        self._writer.close()


class MLflow:
    """A run in the store that MLFLOW_TRACKING_URI names, or else in a database beside the run directory."""

    _STATES: Mapping[str | None, str] = {FINISHED: "FINISHED", FAILED: "FAILED", CANCELLED: "KILLED", None: "KILLED"}

    def __init__(self, target: Target) -> None:
        mlflow = import_module("mlflow")
        self._entities = import_module("mlflow.entities")
        local = f"sqlite:///{(target.path.parent / MLFLOW_DATABASE).absolute()}"
        named = os.environ.get("MLFLOW_TRACKING_URI")
        self.shown = "the store of MLFLOW_TRACKING_URI" if named else f"mlflow ui --backend-store-uri {local}"
        self._client = mlflow.MlflowClient(tracking_uri=named or local)
        self.run = self._resume(mlflow.MlflowException, target.known) or self._begin(target.path.absolute().name)

    def _resume(self, not_found: type[Exception], known: str | None) -> str | None:
        """Returns the run of an earlier process; None if there is none, or the store has it no more."""
        if known is None:
            return None
        try:
            self._client.update_run(known, "RUNNING")
        except not_found as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return known

    def _begin(self, name: str) -> str:
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(wanted)
        number = experiment.experiment_id if experiment else self._client.create_experiment(wanted)
        return str(self._client.create_run(number, run_name=name).info.run_id)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Writes them as the run's parameters."""
        params = [self._entities.Param(name, str(value)) for name, value in values.items()]
        self._client.log_batch(self.run, params=params)

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Writes the figures in one call."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, number) for name, value in figures.items()]
        self._client.log_batch(self.run, metrics=metrics)

    def end(self, status: str | None, figures: Mapping[str, float]) -> None:
        """Writes the run's figures as metrics, and its status."""
        if figures:
            self.log(round(figures["summary/rounds"]), figures)
        self._client.set_terminated(self.run, self._STATES[status])


class WandB:
    """A run of W&B: with an account or a server if one is logged in, otherwise offline in the run directory's wandb/.

    Of the machine, its programs and its user nothing is collected.
    """

    def __init__(self, target: Target) -> None:
        wandb = import_module("wandb")
        private = dict.fromkeys(("x_disable_meta", "x_disable_stats", "x_disable_machine_info", "disable_git"), True)
        settings = wandb.Settings(
            console="off", silent=True, host="", disable_code=True, x_save_requirements=False, **private
        )
        chosen = os.environ.get("WANDB_MODE")
        online = chosen is not None or wandb.login(prompt=False, verify=False)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=target.path.absolute().name,
            id=target.known,
            resume="allow" if target.known else None,
            dir=str(target.path),
            mode=None if online else "offline",
            settings=settings,
        )
        self.run = str(self._run.id)
        offline = f"wandb sync {Path(self._run.settings.sync_dir).parent}/*-{self.run}"
        self.shown = f"offline; to send it: {offline}" if self._run.offline else str(self._run.url)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Writes them as the run's configuration."""
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Writes the figures as one step."""
        self._run.log(dict(figures), step=number, commit=True)

    def end(self, status: str | None, figures: Mapping[str, float]) -> None:
        """Writes the run's figures as its summary, and waits until all has been sent."""
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=0 if status == FINISHED else 1)
