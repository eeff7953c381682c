"""The end of a simulation: export the model if the job asks for it, and answer the run's prompts as a device would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.core.job.settings import Job
from fedtune.server.export.request import export_finished
from fedtune.server.run_directory import SUMMARY
from fedtune.server.run_display import Display
from fedtune.server.run_files import storage, write_json

ANSWER_TOKENS = 64


def export_and_answer(job: Job, path: Path, summary: dict[str, Any], display: Display) -> None:
    """Exports as `export_finished` does, and answers the prompts that the summary shows from the first format.

    Raises:
        RunError: a model could not be written or differs too much from the merged one; the run itself is whole.
    """
    if not job.export.formats:
        return
    from fedtune.client.inference.exported_model import ExportedModel
    from fedtune.client.inference.scheduler import Scheduler

    export_finished(job, path, summary, display)
    first = summary["exports"][0]
    scheduler = Scheduler(ExportedModel(Path(first["path"])), slots=1)
    try:
        for example in summary["answers"]:
            example["exported"] = _answer(scheduler, example["prompt"])
    finally:
        scheduler.close()
    with storage(path):
        write_json(path / SUMMARY, summary)
    _show(summary, first["format"], display)


def _answer(scheduler: Any, prompt: str) -> str:
    import queue

    from fedtune.client.inference.exported_model import Sampling

    ids = scheduler.model.encode(prompt)
    tokens = min(ANSWER_TOKENS, scheduler.model.check_prompt(ids))
    pieces: queue.Queue[Any] = queue.Queue()
    scheduler.submit(ids, Sampling(tokens), None, pieces.put)
    text = ""
    while True:
        piece = pieces.get()
        text += str(piece.text)
        if piece.finish is not None:
            return text


def _show(summary: dict[str, Any], form: str, display: Display) -> None:
    for example in summary["answers"]:
        display.note("")
        display.note(f"  prompt    {' '.join(example['prompt'].split())}")
        display.note(f"  {form:8}  {' '.join(example['exported'].split())}")
    display.note("")
    for done in summary["exports"]:
        display.note(f"{done['format']:8} {done['path']}")
    display.note(f"try it   fedtune chat {summary['exports'][0]['path']} --forget")
