"""Tasks for trainers, from the settings of a job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from fedtune.client.trainer import LocalTask
from fedtune.core.job.local_work import LocalWork, TrainingSettings, local_work


def local_task(seed: int = 1, **settings: Any) -> LocalTask:
    """Returns a task to train both factors under a job with these settings."""
    return LocalTask(seed, local_work(TrainingSettings(**settings)))


def changed(task: LocalTask, **changes: Any) -> LocalTask:
    """Returns the task with other values for some of its fields, or of its work's."""
    work = {name: value for name, value in changes.items() if name in LocalWork.__struct_fields__}
    rest = {name: value for name, value in changes.items() if name not in work}
    return replace(task, work=msgspec.structs.replace(task.work, **work), **rest)
