"""`fedtune export`: the command line around `export_run` and `export_adapter`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fedtune.core.errors import InputError, MissingExtraError
from fedtune.server.display import Display, Silent, Terminal


def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run's directory.")],
    formats: Annotated[
        str, typer.Option("--format", "-f", metavar="FORMAT,...", help="Some of int4, int8, fp16, fp32.")
    ] = "int4",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Each format goes to OUT/FORMAT; by default RUN_DIR/onnx.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="A small .onnx_adapter file, for devices that hold the base.")
    ] = False,
    provider: Annotated[str, typer.Option(help="Build and check for cpu, cuda, dml, ...")] = "cpu",
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="For onnxruntime-genai's builder; may be repeated."),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, max=100, help="Points of exact match that int4, int8 and fp16 may lose.")
    ] = 1.0,
    data: Annotated[
        Path | None, typer.Option(help="Held-out examples to check on; by default the job's data.evaluation.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was exported as JSON, and nothing else.")] = False,
) -> None:
    """Merge a run's adapter, write ONNX, and prove it equal to the merged model before it gets its name.

    Examples:

        fedtune export runs/demo-1 --format int4

        fedtune export runs/demo-1 --format int4,int8,fp16,fp32 --out models/first

        fedtune export runs/demo-2 --adapter-only --out models/adapters
    """
    try:
        from fedtune.server.export.run import ExportOptions, export_adapter, export_run
    except ModuleNotFoundError as error:
        raise MissingExtraError("fedtune export", "export", error.name or "onnxruntime") from error

    wanted = [form.strip() for form in formats.split(",") if form.strip()]
    chosen = ExportOptions(provider, _pairs(options or []), max_drop, data, force)
    target = out or run_directory / "onnx"
    shown: nullcontext[Display] | Terminal = nullcontext(Silent()) if quiet or as_json else Terminal()
    with shown as display:
        if adapter_only:
            if len(wanted) != 1:
                raise InputError("--adapter-only takes one --format, that of the base")
            exported = [export_adapter(run_directory, wanted[0], target, display, chosen)]
        else:
            exported = export_run(run_directory, wanted, target, display, chosen)
        for done in exported:
            display.note(f"{done.format:8} {done.path}")
        if not adapter_only:
            display.note(f"try it: fedtune chat {exported[0].path}")
    if as_json:
        summary = [
            {"path": str(done.path), "format": done.format, "recipe": done.recipe, "gate": done.report.to_json()}
            for done in exported
        ]
        print(json.dumps(summary, indent=2))


def _pairs(options: list[str]) -> dict[str, str]:
    pairs = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key.strip() and equals):
            raise InputError(f"--option {option}: expected KEY=VALUE, e.g. block_size=16")
        pairs[key.strip()] = value.strip()
    return pairs
