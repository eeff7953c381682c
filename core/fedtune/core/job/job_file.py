"""The job file: a job as TOML, which reads back equal. TOML files are read with bounds on their size and depth.

    job = load_job(Path("job.toml"), overrides=["federation.rounds=40"])

Unknown keys, wrong types, values out of bounds and contradictions are all reported at once. A job file names its base
and its training data itself: the demo's are the defaults of a job without a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from fedtune.core.errors import JobError
from fedtune.core.job.contradictions import contradictions
from fedtune.core.job.methods import AGGREGATIONS, Method
from fedtune.core.job.settings import BUNDLED, CORE_RANK, DEMO, LORA_RANK, Job

MAX_JOB_BYTES = 1 << 20
_INPUTS = {
    "model.base": f'a Hugging Face model directory, a hub id, or "{DEMO}" for the bundled model',
    "data.train": f'a file of examples, a pattern such as "clients/*.jsonl", or "{DEMO}" for the bundled households',
}


def load_job(path: Path | None, overrides: Sequence[str] = (), folder: Path | None = None) -> Job:
    """Reads a job file and applies `section.key=value` overrides.

    Args:
        path: TOML file, or None for the defaults, which are the bundled demo.
        overrides: each "section.key=value"; the value is TOML, or a bare string where it is not.
        folder: where relative paths start; by default the job file's folder, or without one the working directory.

    Raises:
        JobError: the job has problems; the error lists all of them.
    """
    job, problems = _read(path, overrides)
    if problems := problems + contradictions(job):
        raise JobError(problems, path)
    return _resolve_paths(job, folder or (path.parent if path else Path.cwd()))


def recorded_job(path: Path) -> Job:
    """Reads the job that a run has recorded, also where this release would not begin it any more.

    Raises:
        JobError: the file is no job.
    """
    job, problems = _read(path, ())
    if problems:
        raise JobError(problems, path)
    return _resolve_paths(job, path.parent)


def job_of_table(table: Mapping[str, Any]) -> Job:
    """Returns the job of a table as a job file has it; keys that it lacks have their defaults.

    Raises:
        JobError: the job has problems; the error lists all of them.
    """
    job, problems = _validate(table)
    if problems := problems + contradictions(job):
        raise JobError(problems)
    return job


def _read(path: Path | None, overrides: Sequence[str]) -> tuple[Job, list[str]]:
    """Returns the job, and a sentence about each key or override that is invalid."""
    table = read_table(path, "a job file", MAX_JOB_BYTES) if path is not None else {}
    problems = [problem for override in overrides if (problem := _apply(table, override))]
    if path is not None:
        problems += _unnamed_inputs(table)
    _choose_adapter(table)
    job, invalid = _validate(table)
    return job, problems + invalid


def _unnamed_inputs(table: dict[str, Any]) -> list[str]:
    """Returns a sentence for each input that a job file must name and does not.

    Data of one's own are not scored on the demo's held-out examples: the table gets no evaluation where it names none.
    """
    model, data = table.get("model", {}), table.setdefault("data", {})
    if not (isinstance(model, dict) and isinstance(data, dict)):
        return []  # refused by validation, with a reason
    if data.get("train") != DEMO:
        data.setdefault("evaluation", "")
    named = {"model.base": "base" in model, "data.train": "train" in data}
    return [f"{key} is not set; expected {_INPUTS[key]}" for key, there in named.items() if not there]


def _choose_adapter(table: dict[str, Any]) -> None:
    """Adds the kind of adapter that suits [federation], and its rank, where the table does not have them."""
    adapter, federation = table.setdefault("adapter", {}), table.get("federation", {})
    if not (isinstance(adapter, dict) and isinstance(federation, dict)):
        return  # refused by validation, with a reason
    method = AGGREGATIONS.get(str(federation.get("aggregation", "fedavg")), Method())
    apart = method.needs_pair or federation.get("rebalance_every", 0) != 0
    kind = adapter.setdefault("kind", "lora" if apart else "core")
    adapter.setdefault("rank", CORE_RANK if kind == "core" else LORA_RANK)


def dump_job(job: Job) -> str:
    """Returns the job as TOML; `load_job` reads an equal job from it."""
    sections = {
        section: {key: value for key, value in settings.items() if value is not None}
        for section, settings in dataclasses.asdict(job).items()
    }
    return tomli_w.dumps(sections)


def _validate(table: Mapping[str, Any]) -> tuple[Job, list[str]]:
    """Returns the job, with the default in place of every invalid key, and a sentence about each of these keys."""
    # Through JSON, where strict mode still accepts a table for a nested dataclass. TOML's dates are not allowed there.
    text = json.dumps(table, default=lambda value: {type(value).__name__: str(value)})
    try:
        return TypeAdapter(Job).validate_json(text), []
    except ValidationError as error:
        reasons: dict[tuple[str, ...], list[str]] = {}
        for detail in error.errors():
            # A key with several allowed types fails once for each; its reasons become one sentence.
            reasons.setdefault(tuple(map(str, detail["loc"][:2])), []).append(_sentence(detail))
    job, further = _validate(_without(json.loads(text), list(reasons)))
    return job, [f"{'.'.join(key)}: {' or '.join(dict.fromkeys(texts))}" for key, texts in reasons.items()] + further


def _without(table: dict[str, Any], keys: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    for section, *key in keys:
        if key and isinstance(table.get(section), dict):
            table[section].pop(key[0], None)
        else:
            table.pop(section, None)
    return table


def _sentence(detail: Mapping[str, Any]) -> str:
    section = detail["loc"][0] if detail["loc"] else ""
    if detail["type"] == "unexpected_keyword_argument":
        known = _known_keys(str(section) if len(detail["loc"]) > 1 else None)
        return f"unknown key; expected one of {', '.join(known)}"
    if detail["type"] in ("tuple_type", "list_type") and isinstance(detail["input"], str | int | float):
        return f"expected a list, such as [{json.dumps(detail['input'])}], got {detail['input']!r}"
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("String should ")
    return f"expected {message}, got {detail['input']!r}"


def _known_keys(section: str | None) -> list[str]:
    sections = {field.name: field.default for field in dataclasses.fields(Job)}
    if section is None:
        return list(sections)
    settings = sections.get(section)
    return [field.name for field in dataclasses.fields(settings)] if settings is not None else []  # type: ignore[arg-type]


def _apply(table: dict[str, Any], override: str) -> str | None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        return f'--set {override}: expected section.key=value, e.g. "federation.rounds=40"'
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    settings = table.setdefault(section, {})
    if not isinstance(settings, dict):
        return f"--set {override}: [{section}] is not a table in the job file"
    settings[key] = value
    return None


def _resolve_paths(job: Job, folder: Path) -> Job:
    def resolve(path: str) -> str:
        return path if path in ("", DEMO) else str((folder / path).absolute())

    base = folder / job.model.base
    local = os.path.isdir(base)  # noqa: PTH112  # Path.is_dir raises where a name is too long for a path
    model = dataclasses.replace(job.model, base=str(base.absolute())) if local else job.model
    if job.model.base == DEMO:
        model = job.model
    data = dataclasses.replace(job.data, train=resolve(job.data.train), evaluation=resolve(job.data.evaluation))
    fleet = job.simulation.fleet
    simulation = job.simulation if fleet == BUNDLED else dataclasses.replace(job.simulation, fleet=resolve(fleet))
    return dataclasses.replace(job, model=model, data=data, simulation=simulation)


_DEEPEST = 8  # levels of nested tables and arrays; a job has three


def read_table(path: Path, what: str, limit: int) -> dict[str, Any]:
    """Returns the content of a TOML file.

    Args:
        what: name for messages, such as "a job file".
        limit: largest size in bytes.

    Raises:
        JobError: the file cannot be read, is larger than `limit`, is nested too deeply, or is not TOML.
    """
    try:
        if path.stat().st_size > limit:
            raise JobError([f"larger than {limit} bytes; expected {what}"], path)
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError([f"cannot be read: {error.strerror}"], path) from error
    except ValueError as error:  # invalid grammar or characters, or a number with too many digits
        raise JobError([f"not TOML: {error}"], path) from error
    except RecursionError as error:
        raise JobError([f"nested too deep; expected {what}"], path) from error
    if _is_deeper(table, _DEEPEST):
        raise JobError([f"nested too deep; expected {what}"], path)
    return table


def _is_deeper(value: object, depth: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(depth == 0 or _is_deeper(part, depth - 1) for part in inside)
