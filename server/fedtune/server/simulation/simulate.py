"""The commands `fedtune simulate` and `fedtune resume`, which run a job in this process.

All user input is checked first; torch, transformers and Flower are imported only after that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.core.errors import JobError
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.spans import span
from fedtune.server.custom_metrics import NO_METRICS, CustomMetrics
from fedtune.server.export.request import export_finished
from fedtune.server.preflight import check_simulation
from fedtune.server.run_directory import SUMMARY, RunDirectory, check_free, is_finished, read_summary
from fedtune.server.run_display import Display
from fedtune.server.run_files import storage, write_json
from fedtune.server.run_profile import Keep, profiling

ANSWER_TOKENS = 64


def simulate(
    job: Job,
    path: Path,
    display: Display,
    *,
    force: bool = False,
    profile: bool = False,
    metrics: CustomMetrics = NO_METRICS,
) -> dict[str, Any]:
    """Runs a job from its beginning in a new run directory.

    Args:
        force: replace a run that is there.
        profile: measure where the time goes, and write that into the run directory as well.
        metrics: the user's own metrics.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: the job, its data, its model or a metric cannot be used, or the path is taken; nothing was written.
        RunError: the run could not go on; it can be resumed.
    """
    check_free(path, force)
    with _profiling(job, display) if profile else nullcontext(_keep_nothing) as keep:
        return _simulate(job, path, display, force, keep, metrics)


def _profiling(job: Job, display: Display) -> AbstractContextManager[Keep]:
    if job.simulation.backend == "ray":
        problem = 'simulation.backend is "ray", whose actors may be on machines with clocks of their own'
        raise JobError([f'{problem}; for --profile expected "local"'])
    return profiling(display)


def _keep_nothing(path: Path) -> None:
    """Takes no note of the run directory, where there is no profile."""


def _simulate(
    job: Job, path: Path, display: Display, force: bool, keep: Keep, metrics: CustomMetrics
) -> dict[str, Any]:
    with span("loading model and data"):
        inputs = check_simulation(job)
        from fedtune.server.simulation.simulated_run import open_context, run_job

        context = open_context(inputs, path, display, metrics)
    rated = with_learning_rate(job, context.model.layout)
    resolved = replace(rated, simulation=replace(rated.simulation, together=context.together))
    with closing(RunDirectory.create(path, resolved, context.base.digest, force)) as directory:
        keep(path)
        summary = run_job(context, directory, display)
    _export_and_answer(job, path, summary, display)
    return summary


def resume(
    path: Path, display: Display, *, profile: bool = False, metrics: CustomMetrics = NO_METRICS
) -> dict[str, Any]:
    """Resumes an interrupted run; its result equals an uninterrupted run's bit for bit.

    Args:
        profile: measure where the time of the rest goes; a profile of an earlier part is replaced.
    """
    with closing(RunDirectory.open(path)) as directory:
        job = directory.job()
    with _profiling(job, display) if profile else nullcontext(_keep_nothing) as keep:
        keep(path)
        return _resume(job, path, display, metrics)


def _resume(job: Job, path: Path, display: Display, metrics: CustomMetrics) -> dict[str, Any]:
    with closing(RunDirectory.open(path)) as directory:
        with span("loading model and data"):
            inputs = check_simulation(job)
            from fedtune.server.simulation.simulated_run import open_context, run_job

            if is_finished(path) and read_summary(path).get("ended"):
                display.note("a budget has ended the run; it goes on if the limit in its job.toml was raised since")
            elif is_finished(path):
                display.note("all rounds are done already; only what follows from them is written again")
            context = open_context(inputs, path, display, metrics)
        summary = run_job(context, directory, display)
    _export_and_answer(job, path, summary, display)
    return summary


def _export_and_answer(job: Job, path: Path, summary: dict[str, Any], display: Display) -> None:
    """Exports the model if the job asks for it, and answers the run's prompts with the exported model.

    Args:
        summary: gains "exports" and the first format's answer to each prompt, here and in summary.json.

    Raises:
        RunError: a model could not be written or differs too much from the merged one; the run itself is whole.
    """
    if not job.export.formats:
        return
    from fedtune.client.inference.exported_model import ExportedModel, Sampling
    from fedtune.client.inference.scheduler import Scheduler

    with span("export"):
        export_finished(job, path, summary, display)
    first = summary["exports"][0]
    model = ExportedModel(Path(first["path"]))
    scheduler = Scheduler(model, slots=1)
    try:
        for example in summary["answers"]:
            ids = model.encode(example["input"])
            sampling = Sampling(min(ANSWER_TOKENS, model.check_prompt(ids)))
            with span("sample answers"):
                example["exported"] = "".join(scheduler.answer(ids, sampling))
    finally:
        scheduler.close()
    with storage(path):
        write_json(path / SUMMARY, summary)
    _show(summary, first["format"], display)


def _show(summary: dict[str, Any], form: str, display: Display) -> None:
    for example in summary["answers"]:
        display.note("")
        display.note(f"  prompt    {' '.join(example['prompt'].split())}")
        display.note(f"  {form:8}  {' '.join(example['exported'].split())}")
    display.note("")
    for done in summary["exports"]:
        display.note(f"{done['format']:8} {done['path']}")
    display.note(f"try it   fedtune chat {summary['exports'][0]['path']} --forget")
