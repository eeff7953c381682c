"""`fedtune edge`: prepare base models for devices that have no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedtune.core.errors import MissingExtraError

app = typer.Typer(help="Prepare base models for devices that train without torch.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Prepare base models for devices that train without torch."""


@app.command()
def pack(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base model: a directory, a hub id, or demo for the bundled one.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="A new directory for the pack.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the pack's facts as JSON, and nothing else.")] = False,
) -> None:
    """Write a base model as an edge pack, on which devices train with onnxruntime and numpy alone.

    The pack has the model's weights in NF4, in a file that devices map into memory; graphs of one block's forward and
    backward pass and of the head; and the tokenizer. A device that has only the pack trains the same adapters of the
    same base as one with torch: the base's digest, which this command prints, is equal on both. It runs once per base,
    for all jobs, adapters and ranks, takes about a minute and the memory of the unpacked model.

    Llama, Mistral, Qwen2, Qwen3, Gemma and Phi-3 have packs. Example:

        fedtune edge pack /models/SmolLM2-135M --out packs/SmolLM2-135M

    Copy the whole directory to the devices, or let them pull it: write it to packs/NAME/edge in the server's folder and
    release packs/NAME with fedtune fleet publish. They check every file in it before they train.
    """
    from fedtune.core.job.settings import ModelSettings

    try:
        import onnxscript  # noqa: F401  # torch's exporter would miss it only when the graphs are written

        from fedtune.edge.pack_writer import write_pack
    except ModuleNotFoundError as error:
        raise MissingExtraError("fedtune edge pack", "export", error.name or "of the export") from None
    facts = write_pack(ModelSettings(base), out)
    if as_json:
        print(json.dumps(asdict(facts), indent=2))
    elif not quiet:
        size = sum(path.stat().st_size for path in out.iterdir())
        print(f"{out}: {facts.architecture}, {facts.shape.layers} blocks, {size / 1e6:.1f} MB")
        print(f"base {facts.base_digest}")
