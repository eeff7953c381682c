"""The last step of a run whose job asks for it, simulated or live: the model, in the formats of the job's [export]."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from fedtune.core.errors import MissingExtraError
from fedtune.core.job.settings import Job
from fedtune.server.run_directory import SUMMARY
from fedtune.server.run_display import Display
from fedtune.server.run_files import storage, write_json

ONNX = "onnx"  # the folder of a run directory where each format has its own
_NEEDED = ("onnx", "onnxruntime_genai", "onnxscript", "tokenizers")


def check_export(job: Job) -> None:
    """Says before a run what would stop its export after it.

    Raises:
        MissingExtraError: the job wants an export, and its packages are not installed.
    """
    for package in _NEEDED if job.export.formats else ():
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("[export]", "export,inference", package)


def export_finished(job: Job, path: Path, summary: dict[str, Any], display: Display) -> None:
    """Writes the job's formats to the run directory; an earlier export is replaced.

    Args:
        summary: of the finished run; it gains "exports", here and in summary.json.

    Raises:
        RunError: a model could not be written or differs too much from the merged one; the run itself is whole.
    """
    if not job.export.formats:
        return
    from fedtune.server.export.exporter import WORKPLACE, ExportOptions, export_run

    for left in (path / ONNX).glob(f"{WORKPLACE}*"):  # by a process that was killed in the middle of this
        shutil.rmtree(left, ignore_errors=True)
    exported = export_run(path, job.export.formats, path / ONNX, display, ExportOptions(force=True))
    summary["exports"] = [
        {"format": done.format, "path": str(done.path), "recipe": done.recipe, "gate": done.report.to_json()}
        for done in exported
    ]
    with storage(path):
        write_json(path / SUMMARY, summary)
