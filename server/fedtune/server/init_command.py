"""`fedtune init`: the command line around `job_proposal`."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOB_FILE = "job.toml"


def init(
    model: Annotated[
        str, typer.Option("--model", metavar="BASE", help="The base model: a directory, a hub id, or `demo`.")
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="The examples: a file, or a quoted pattern with one a client.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="[FOLDER|JOB.toml]", help="Where to write; by default job.toml here.")
    ] = Path(JOB_FILE),
    clients: Annotated[
        int | None,
        typer.Option("--clients", min=1, help="Number of simulated clients; by default as the data suggests."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a job file for a base model and a data set, with a comment on every line.

    Reads the first records and, where it is on this machine, the base's tokenizer; it loads no weights. Then:
    fedtune check job.toml, and fedtune simulate job.toml.

    Examples:

        fedtune init --model Qwen/Qwen3-0.6B --data 'clients/*.jsonl'

        fedtune init first --model ./base --data all.csv --clients 20
    """
    from fedtune.data.job_inputs import named_source
    from fedtune.model.weight_headers import linear_layers
    from fedtune.server.job_proposal import Inputs, Tokens, look_at, propose, propose_clients
    from fedtune.server.run_files import write_text

    path = target if target.suffix == ".toml" else target / JOB_FILE
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; --force replaces it")
    source, found = named_source(model), look_at(data)
    dealt = propose_clients(found, clients)
    tokens = Tokens.of(found.records, _tokenizer(source))
    inputs = Inputs(_seen_from(path.parent, model) if Path(model).is_dir() else model, _seen_from(path.parent, data))
    sides = [min(module.d_in, module.d_out) for module in linear_layers(Path(source)) or ()]
    text = propose(inputs, found, tokens, dealt, _positions(source), min(sides, default=None))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"{path}: written for {dealt.number:,} clients; files {len(found.files):,}, records {len(found.records):,}")
    if found.bad:
        print(f"lines among them that are no record: {found.bad:,}; the check names them")
    if not tomllib.loads(text).get("secure_aggregation", {}).get("enabled", True):
        print("secure aggregation is off, so the server sees every update: clients are too few to hide in a sum")
    print(f"next: fedtune check {path}, then fedtune simulate {path}")


def _seen_from(folder: Path, path: str) -> str:
    """Returns a path or pattern as the job file names it: relative ones start at its folder."""
    return path if Path(path).is_absolute() else os.path.relpath(path, folder)


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """Returns the base's tokenizer; None where it is not on this machine, or nothing is installed to read it."""
    try:
        from huggingface_hub import try_to_load_from_cache

        if not Path(source).is_dir() and not isinstance(try_to_load_from_cache(source, "tokenizer_config.json"), str):
            return None
        from fedtune.model.base_model import load_tokenizer, quiet
    except ModuleNotFoundError:
        return None
    with quiet():
        return load_tokenizer(source)


def _positions(source: str) -> int | None:
    """Returns the longest sequence that the base supports, if its configuration is on this machine and says so."""
    try:
        stated = json.loads((Path(source) / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return stated if isinstance(stated, int) and stated > 0 else None
