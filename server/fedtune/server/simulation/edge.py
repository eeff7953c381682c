"""The last step of a run whose job asks for it: export the model, and answer the run's prompts as a device would."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedtune.core.errors import MissingExtraError
from fedtune.core.job import Job
from fedtune.server.display import Display
from fedtune.server.files import storage, write_json
from fedtune.server.run_directory import SUMMARY

ONNX = "onnx"  # the folder of a run directory where each format has its own
ANSWER_TOKENS = 64
_NEEDED = ("onnx", "onnxruntime_genai", "onnxscript", "tokenizers")


def check_export(job: Job) -> None:
    """Says before a run what would stop its export after it.

    Raises:
        MissingExtraError: the job wants an export, and its packages are not installed.
    """
    for package in _NEEDED if job.export.formats else ():
        if find_spec(package) is None:
            raise MissingExtraError("[export]", "export,inference", package)


def export_and_answer(job: Job, path: Path, summary: dict[str, Any], display: Display) -> None:
    """Writes the job's formats to the run directory, and answers the prompts that the summary shows from the first.

    Args:
        summary: of the finished run; it gains "exports", here and in summary.json.

    Raises:
        RunError: a model could not be written or differs too much from the merged one; the run itself is whole.
    """
    if not job.export.formats:
        return
    from fedtune.client.inference.model import ExportedModel
    from fedtune.client.inference.scheduler import Scheduler
    from fedtune.server.export.run import ExportOptions, export_run

    exported = export_run(path, job.export.formats, path / ONNX, display, ExportOptions(force=True))
    summary["exports"] = [
        {"format": done.format, "path": str(done.path), "recipe": done.recipe, "gate": done.report.to_json()}
        for done in exported
    ]
    scheduler = Scheduler(ExportedModel(exported[0].path), slots=1)
    try:
        for example in summary["answers"]:
            example["exported"] = _answer(scheduler, example["prompt"])
    finally:
        scheduler.close()
    with storage(path):
        write_json(path / SUMMARY, summary)
    _show(summary, exported[0].format, display)


def _answer(scheduler: Any, prompt: str) -> str:
    import queue

    from fedtune.client.inference.model import Sampling

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
