"""The base models that a device brings: which of them it can train, and the plan for each before any job is known.

for outcome in plan_bases(planner, [Path("packs/SmolLM2-135M")], Path("mine.jsonl"), "always"): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.client.plan.device_plan import DevicePlanner, Outcome, Trial
from fedtune.client.plan.planner import NoPlanError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import DEMO, Job
from fedtune.demo import JOB


def plan_bases(planner: DevicePlanner, bases: Sequence[Path], data: Path, trial: Trial) -> list[Outcome]:
    """Plans for each base model that a device brings, or for the bundled one, before any job is known.

    Rank, batch and lengths are the defaults of a job.

    Raises:
        NoPlanError: none of them fits; the message has the numbers of each.
        MissingExtraError: the libraries for all of them are missing.
        DataError, ModelError, RunError: as in `DevicePlanner.plan`.
    """
    plans, refusals = [], []
    for base in usable_bases(planner, bases):
        job = load_job(JOB) if base == DEMO else Job()
        job = replace(job, model=replace(job.model, base=base), data=replace(job.data, skip_bad=True))
        try:
            plans.append(planner.plan(job, data, trial=trial))
        except NoPlanError as error:
            refusals.append(f"{base}: {error}")
            planner.note(refusals[-1])
    if not plans:
        raise NoPlanError("\n".join(refusals))
    return plans


def usable_bases(planner: DevicePlanner, bases: Sequence[Path]) -> list[str]:
    """Returns those of a device's base models whose library is installed; a device without any has the bundled one.

    Raises:
        MissingExtraError: there is none.
    """
    brought = [str(path.absolute()) for path in bases] or [DEMO]
    usable = [base for base in brought if planner.backends.installed(base)]
    if not usable:
        planner.backends.of(brought[0])  # raises
    for base in brought:
        if base not in usable:
            planner.note(f"{base}: the library that trains it is not installed here")
    return usable
