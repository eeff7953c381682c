"""Exports whose ONNX is written in this process, since a child process takes seconds to start."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from fedtune.server.export.build_child import build_one
from fedtune.server.export.builder import Build
from fedtune.server.export.exporter import Exported, ExportTools
from fedtune.server.export.grid_graph import Progress
from fedtune.server.export.request import ExportOptions, ExportRequest, export
from fedtune.server.run_display import Silent

MakeRun = Callable[..., Path]


def build_here(wanted: Build, log: Path, watch: Progress) -> str:
    """Builds a model as the child process does; test_architectures runs the child itself."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with (
        log.open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            return build_one(json.loads(json.dumps(asdict(wanted), default=str)), watch)
        finally:
            root.handlers, root.level = before


HERE = ExportTools(build=build_here)


def export_run(
    run: Path, formats: Sequence[str], out: Path, options: ExportOptions | None = None, tools: ExportTools = HERE
) -> list[Exported]:
    """Exports a run's merged model in several formats, each into `out`/FORMAT."""
    return export(ExportRequest(run, tuple(formats), out, options or ExportOptions()), Silent(), tools)


def export_adapter(run: Path, form: str, out: Path, options: ExportOptions | None = None) -> Exported:
    """Exports a run's adapter, and the base if `out` has none yet."""
    (done,) = export(ExportRequest(run, (form,), out, options or ExportOptions(), adapter_only=True), Silent(), HERE)
    return done
