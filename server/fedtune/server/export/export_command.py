"""`fedtune export`: the command line around `request.export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.core.errors import InputError
from fedtune.server.run_display import shown

if TYPE_CHECKING:
    from fedtune.server.export.request import ExportRequest


def export(
    context: typer.Context,
    run_directory: Annotated[
        Path,
        typer.Argument(metavar="RUN_DIR", help="The directory of a finished run: fedtune simulate prints its name."),
    ],
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT,...",
            help="How weights are stored. int4: an eighth of the size, fastest on CPUs, for devices. int8: a quarter. "
            "fp16: half, exact enough to keep. fp32: the merged model itself.",
        ),
    ] = "int4",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Each format goes to OUT/FORMAT; by default RUN_DIR/onnx.")
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only",
            help="Write a small .onnx_adapter file, and the base once: devices that hold the base fetch only the file, "
            "and fedtune serve swaps it while it runs.",
        ),
    ] = False,
    provider: Annotated[
        str,
        typer.Option(help="The hardware that the model will run on: cpu, cuda, dml, ...; the check runs on it, here."),
    ] = "cpu",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="KEY=VALUE",
            help="For the graph, to onnxruntime-genai's model builder, e.g. fuse_qkv=false; may be given again.",
        ),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option(
            min=0, max=100, help="Points of exact match and token accuracy that int4, int8 and fp16 may lose."
        ),
    ] = 1.0,
    max_rise: Annotated[
        float, typer.Option(min=0, help="Percent by which the perplexity of int4, int8 and fp16 may rise.")
    ] = 2.0,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out examples to check on, at most.")] = 200,
    exact_products: Annotated[
        bool,
        typer.Option(
            "--exact-products",
            help="Multiply int4 and int8 weights with float32 activations, not rounded to 8 bits: nearer to the merged "
            "model. int8 then decodes some 20 times slower than fp32, int4 some 10 times: its head has 8 bits.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Held-out examples to check on, JSONL; by default the job's data.evaluation."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the exports as JSON, and nothing else.")] = False,
) -> None:
    """Make a model that devices can run, without torch, from a finished run.

    It merges the run's adapter into its base model, writes ONNX with a KV cache, and proves it on held-out examples
    before it gets its name: fp32 must give the merged model's logits to 1e-3 and every argmax, the smaller formats may
    lose a point, and 2% of perplexity. int4 is quantized with its errors compensated on some of the examples. A format
    that cannot pass gives way to the next larger one, and the reason is said and kept. Examples:

        fedtune export runs/demo-1

        fedtune export runs/demo-1 --format int4,int8,fp16,fp32 --out models/first

        fedtune export runs/demo-2 --adapter-only --out models/adapters

    Then: fedtune chat runs/demo-1/onnx/int4, or fedtune serve runs/demo-1/onnx/int4.
    """
    from fedtune.server.export.request import ONNX, ExportOptions, ExportRequest

    wanted = tuple(form.strip() for form in formats.split(",") if form.strip())
    chosen = ExportOptions(provider, _pairs(options or []), max_drop, max_rise, prompts, exact_products, data, force)
    request = ExportRequest(run_directory, wanted, out or run_directory / ONNX, chosen, adapter_only)
    with shown(quiet or as_json, lambda: _after_interruption(request)) as display:
        exported = context.obj.export(request, display)
        for done in exported:
            display.note(f"{done.format:8} {done.path}")
        if not adapter_only:
            display.note(f"try it: fedtune chat {exported[0].path}")
    if as_json:
        print(json.dumps([done.to_json() for done in exported], indent=2))


def _after_interruption(request: ExportRequest) -> str:
    """Returns what Ctrl-C leaves: formats are published at the end, each as a whole."""
    kept = ", ".join(str(target) for target in request.targets if target.exists())
    there = f"what is in {kept} is whole" if kept else "nothing was exported"
    return f"{there}, and the run in {request.run} is unchanged. An export cannot go on: give the same command again"


def _pairs(options: list[str]) -> dict[str, str]:
    pairs = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key.strip() and equals):
            raise InputError(f"--option {option}: expected KEY=VALUE, e.g. fuse_qkv=false")
        pairs[key.strip()] = value.strip()
    return pairs
