"""The input files of a job: its base model, its data, its fleet.

    inputs = JobInputs(job)
    inputs.check_server()       # raises InputError in a fraction of a second, without torch
    inputs.population.names

Commands read these files before they import large libraries, so that a mistyped path is reported at once; the run then
uses the contents that were read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedtune.core.errors import DataError, ModelError
from fedtune.core.job.device_kinds import Fleet, load_fleet
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import BUNDLED, DEMO, Job
from fedtune.data.model_hub import cached_model, can_reach_hub, hub_address
from fedtune.data.population import Population, evaluation_records
from fedtune.data.records import Record
from fedtune.demo import BASE_DIRECTORY, FLEET, JOB

PACK_FACTS = "edge.json"
"""The file that makes a directory an edge pack."""


@dataclass(frozen=True)
class JobInputs:
    """The contents of a job's files; each file is read once, when it is first used."""

    job: Job

    @cached_property
    def population(self) -> Population:
        """The clients of the job's data."""
        return Population(self.job.data, self.job.training.seed)

    @cached_property
    def evaluation(self) -> list[Record]:
        """The server's held-out records."""
        return evaluation_records(self.job.data)

    @cached_property
    def fleet(self) -> Fleet | None:
        """The kinds of device that the job simulates; None where all devices are alike."""
        named = self.job.simulation.fleet
        return load_fleet(FLEET if named == BUNDLED else Path(named)) if named else None

    def check_server(self) -> None:
        """Checks the inputs of a server: the base model's location and the held-out examples.

        Raises:
            ModelError: the base is a path, but not of a model directory.
            DataError: the held-out examples cannot be read.
        """
        source_of(self.job.model.base)
        _ = self.evaluation


def job_or_demo(path: Path | None, overrides: Sequence[str]) -> Job:
    """Reads a job file, or without one the bundled demo's, to which the working directory's paths can be given.

    Raises:
        JobError: the job has problems; the error lists all of them.
    """
    return load_job(path or JOB, overrides, None if path else Path.cwd())


def source_of(base: str) -> str:
    """Returns the base model's source for transformers: a directory, or a hub id.

    Where the hub cannot be reached, the source of a hub id is its directory in this machine's cache.

    Raises:
        ModelError: the path is not a model directory, or neither hub nor cache has the model.
    """
    named = named_source(base)
    if Path(named).is_dir() or can_reach_hub():
        return named
    with suppress(ValueError):
        if (cached := cached_model(base)) is not None:
            return str(cached)
    raise ModelError(
        f"{base}: no directory, not in this machine's cache of the hub, and {hub_address()} cannot be reached; "
        "expected the directory of a model that was copied here, or a network to download it once"
    )


def named_source(base: str) -> str:
    """Returns the directory or hub id that a base names, without a look at the hub.

    Raises:
        ModelError: the path is not a model directory.
    """
    if base == DEMO:
        return str(BASE_DIRECTORY)
    path = Path(base)
    if path.is_dir():
        if is_pack(path):
            raise ModelError(f"{base}: an edge pack, on which devices train; expected the model that it was made of")
        if not (path / "config.json").is_file():
            raise ModelError(f"{base}: not a model directory: it has no config.json")
        return base
    if path.exists() or path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
        raise ModelError(f"{base}: not a directory; expected a Hugging Face model directory, a hub id or {DEMO!r}")
    return base


def is_pack(path: Path) -> bool:
    """Returns whether a directory is an edge pack, as `fedtune edge pack` writes it, and no model directory."""
    return (path / PACK_FACTS).is_file()


def own_data_file(path: Path) -> Path:
    """Returns the path of this device's examples, after a check that the file exists.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(path, "no such file; expected one with this device's examples")
    return path
