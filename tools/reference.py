"""Writes the reference of all job keys, docs/job-keys.md, and of all commands, docs/commands.md, from the code.

Meanings of keys are the docstrings of the settings' dataclasses, and types, bounds and defaults are their fields. The
refusals are the messages of `contradictions`, which is asked about many jobs: a few to begin from, with one or two keys
set to other values. `make reference` writes both files, and tests/unit/test_reference.py fails if one is stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
import click
import typer

from fedtune.core.errors import JobError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.learning_rates import LEARNING_RATES
from fedtune.core.job.settings import Job
from fedtune.core.job.unusual import Surroundings, unusual
from fedtune.server.cli import app

ROOT = Path(__file__).parents[1]
JOB_KEYS = ROOT / "docs" / "job-keys.md"
COMMANDS = ROOT / "docs" / "commands.md"
WRITTEN = "<!-- Written by `make reference` from the code; change the docstrings there. -->"

BEGINNINGS: Sequence[Mapping[str, Any]] = (
    {},
    {"secure_aggregation.enabled": False},
    {"federation.clients_per_round": 40, "secure_aggregation.groups": 6},
)
"""Jobs without contradictions, from which the search for refusals begins."""

# Values to try for keys of other types than choices and booleans: such as contradict the defaults or each other.
TRIED: Mapping[str, Sequence[Any]] = {
    "adapter.tiers": ([8, 16],),
    "data.partition": ("iid",),
    "data.evaluation": ("",),
    "data.sequence_length": (4096,),
    "training.local_steps": (20,),
    "training.local_epochs": (1.0,),
    "federation.clients_per_round": (3, 12),
    "federation.minimum_clients": (50,),
    "federation.rebalance_every": (4,),
    "federation.server_learning_rate": (0.1,),
    "federation.robust_share": (0.1,),
    "federation.clip_norm": (1.0,),
    "federation.evaluate_clients_every": (1,),
    "compression.bits": (1,),
    "compression.density": (0.1,),
    "secure_aggregation.max_dropout": (0.8,),
    "secure_aggregation.max_corrupt": (0.5,),
    "secure_aggregation.groups": (2, 4, 13),
    "simulation.workers": (2,),
    "simulation.threads": (2,),
    "simulation.together": (2,),
    "simulation.fleet": ("fleet.toml",),
    "simulation.ranks": ([5], [8]),
    "export.formats": (["int4"],),
    "budget.money": (1.0,),
}

# Unusual values, each of which gives a warning with the base and the data of SURROUNDINGS.
UNUSUAL: Sequence[str] = (
    "training.learning_rate=1.0",
    "adapter.rank=128",
    "training.local_steps=500",
    "training.batch_tokens=1024",
    "federation.clients_per_round=50",
    "data.sequence_length=2048",
    "data.holdout=0.6",
    "simulation.together=30",
)
SURROUNDINGS = Surroundings(width=576, positions=1024, evaluated=20, clients=20, example_tokens=400)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the job file: its section and name, what it takes, its default as TOML, and its meaning."""

    section: str
    name: str
    takes: str
    default: str
    meaning: str
    choices: tuple[Any, ...]

    @property
    def path(self) -> str:
        """The key as `--set` names it."""
        return f"{self.section}.{self.name}"


def described(docstring: str) -> tuple[str, dict[str, str]]:
    """Returns the text of a docstring before its arguments, and what it says about each argument."""
    before, _, arguments = inspect.cleandoc(docstring).partition("\nArgs:\n")
    about: dict[str, str] = {}
    for found in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE):
        for name in found[1].split(", "):
            about[name] = " ".join(found[2].split())
    return " ".join(before.split()), about


def keys() -> Iterator[Key]:
    """Yields every key of the job, in the order of the settings.

    Raises KeyError for a key that its docstring does not explain.
    """
    defaults = Job()
    for section in dataclasses.fields(Job):
        settings = getattr(defaults, section.name)
        hints = get_type_hints(type(settings), include_extras=True)
        _, about = described(type(settings).__doc__ or "")
        for field in dataclasses.fields(settings):
            default, hint = getattr(settings, field.name), hints[field.name]
            yield Key(section.name, field.name, takes(hint), _toml(default), about[field.name], tuple(_choices(hint)))


def takes(hint: Any, many: bool = False) -> str:
    """Returns what a type allows, in words; None, which stands for a key that is not set, is left out."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return takes(inner[0], many) + _within(inner[1:])
    if origin is Literal:
        return _one_of([f"`{_toml(value)}`" for value in inner])
    if origin in (Union, types.UnionType):
        return ", or ".join(takes(one, many) for one in inner if one is not type(None))
    if origin is tuple:
        return f"a list of {takes(inner[0], many=True)}"
    return {
        bool: "`true` or `false`",
        int: "whole numbers" if many else "a whole number",
        float: "numbers" if many else "a number",
        str: "texts" if many else "a text",
    }[hint]


def _within(constraints: Sequence[Any]) -> str:
    """Returns the bounds of a number as the end of a sentence; other constraints are left to the key's meaning."""
    bounds = {type(one): one for field in constraints for one in getattr(field, "metadata", ())}
    low = {annotated_types.Ge: "ge", annotated_types.Gt: "gt"}
    high = {annotated_types.Le: "le", annotated_types.Lt: "lt"}
    lowest = next((getattr(bounds[kind], name) for kind, name in low.items() if kind in bounds), None)
    highest = next((getattr(bounds[kind], name) for kind, name in high.items() if kind in bounds), None)
    return within(lowest, highest, annotated_types.Gt in bounds, annotated_types.Lt in bounds)


def within(lowest: float | None, highest: float | None, above: bool = False, below: bool = False) -> str:
    """Returns " from 1 to 8" and the like; "" where there is no bound.

    Args:
        above, below: whether the bounds themselves are excluded.
    """
    if lowest is not None and highest is not None and not (above or below):
        return f" from {_number(lowest)} to {_number(highest)}"
    first = [] if lowest is None else [f" {'above' if above else 'of at least'} {_number(lowest)}"]
    last = [] if highest is None else [f" {'below' if below else 'at most'} {_number(highest)}"]
    return " and".join(first + last)


def _number(number: float) -> str:
    power = int(number).bit_length() - 1
    return f"2^{power}" if power >= 24 and number == 1 << power else f"{number:,}".removesuffix(".0")


def _one_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _choices(hint: Any) -> Iterator[Any]:
    if hint is bool:
        yield from (True, False)
    elif get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in (Union, types.UnionType, Annotated):
        for one in get_args(hint):
            yield from _choices(one)


def refusals() -> dict[str, list[str]]:
    """Returns the contradictions between keys that a job is refused for, keyed by the key that a message begins with.

    Of messages that differ in values only, the one with the fewest changes of keys stands for all.
    """
    values = {key.path: [*TRIED.get(key.path, ()), *key.choices] for key in keys()}
    changes = [(path, value) for path, several in values.items() for value in several]
    alike: dict[str, dict[str, None]] = {}
    for number in (1, 2):
        for beginning in BEGINNINGS:
            for changed in combinations(changes, number):
                for message in _problems({**beginning, **dict(changed)}):
                    alike.setdefault(_VALUE.sub("0", message), {})[message] = None
    sections = [section.name for section in dataclasses.fields(Job)]
    by_key: dict[str, list[str]] = {}
    for messages in alike.values():
        example, *others = messages
        first = next(word for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)?", example) if word.split(".")[0] in sections)
        by_key.setdefault(first, []).append(f"`{example}`{_also(example, others)}")
    return by_key


_VALUE = re.compile(r"\"[^\"]*\"|\[[^]]*\]|\d+(?:\.\d+)?")


def _also(example: str, others: Sequence[str]) -> str:
    """Returns the other names, as opposed to numbers, that stand in messages like the example."""
    names = [name for other in others for name in _VALUE.findall(other) if name.startswith('"')]
    further = [f"`{name}`" for name in dict.fromkeys(names) if name not in example]
    return f" (likewise {', '.join(further)})" if further else ""


def _problems(settings: Mapping[str, Any]) -> Sequence[str]:
    try:
        load_job(None, [f"{path}={_toml(value)}" for path, value in settings.items()])
    except JobError as error:
        return error.problems
    return ()


def warnings() -> list[str]:
    """Returns an example of each warning about an unusual value, with what the base and the data are like."""
    found = [line for change in UNUSUAL for line in unusual(load_job(None, [change]), SURROUNDINGS)]
    return list(dict.fromkeys(found))


def job_keys() -> str:
    """Returns docs/job-keys.md."""
    refused = refusals()
    lines = [WRITTEN, "", "# Job keys", "", *_HEAD.strip().splitlines()]
    section = ""
    for key in keys():
        if key.section != section:
            section = key.section
            lines += ["", f"## [{section}]", "", _sentence(described(_docstring(section))[0].partition(": ")[2])]
            lines += _refused(refused.get(section, []))
        default = "not set by default" if key.default == "null" else f"by default `{key.default}`"
        lines += ["", f"### {key.path}", "", f"Takes {key.takes}; {default}.", "", _sentence(key.meaning)]
        lines += _refused(refused.get(key.path, []))
    lines += ["", "## Default learning rates", "", *_RATES.strip().splitlines(), "", *_rates()]
    lines += ["", "## Unusual values", "", *_UNUSUAL.strip().splitlines(), ""]
    lines += [f"- `{warning}`" for warning in warnings()]
    return "\n".join(lines) + "\n"


_HEAD = """
Every key of a job file, by section. `fedtune init` writes a file with the keys that depend on your base model and
data, and a comment on each line; every other key has the default given here. `--set section.key=value` overrides one
key on the command line. An unknown key, a wrong type, a value out of bounds and keys that contradict each other are
refused, all at once, before anything runs. The messages about contradictions are below the key that they begin with,
each with the values of one example.
"""
_RATES = """
The learning rate of round 1 where `training.learning_rate` is not set. It depends on the adapter's kind, the
optimizer and the width of the base, which is the number of inputs of most of its layers.
"""
_UNUSUAL = """
These are allowed, and `fedtune check`, `simulate` and `plan` say that they are unusual, as here for a base of width
576 for sequences of up to 1,024 tokens, 20 clients, 20 held-out examples for the server and 400 tokens an example:
"""


def _rates() -> Iterator[str]:
    yield from ("| adapter.kind | training.optimizer | base of width | learning rate |", "|---|---|---|---|")
    for (kind, optimizer), rates in LEARNING_RATES.items():
        for widest, rate in rates:
            width = f"up to {widest:,g}" if math.isfinite(widest) else "wider" if len(rates) > 1 else "any"
            yield f"| {kind} | {optimizer} | {width} | {rate} |"


def _docstring(section: str) -> str:
    return type(getattr(Job(), section)).__doc__ or ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _refused(messages: Sequence[str]) -> list[str]:
    return ["", "Refused:", "", *(f"- {message}" for message in messages)] if messages else []


def commands() -> str:
    """Returns docs/commands.md."""
    lines = [WRITTEN, "", "# Commands", "", *_COMMANDS_HEAD.strip().splitlines()]
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    for name, command in root.commands.items():
        lines += _command(f"fedtune {name}", command, "##")
        if isinstance(command, click.Group):
            for inner, sub in command.commands.items():
                lines += _command(f"fedtune {name} {inner}", sub, "###")
    return "\n".join(lines) + "\n"


_COMMANDS_HEAD = """
Every command, as `fedtune COMMAND --help` explains it in the terminal. `fedtune --version` prints the version, and
`fedtune --install-completion` has the shell complete commands and options. The exit status is 0 after success, 1 if a
run failed, 2 on wrong input, and 130 after Ctrl-C.
"""


def _command(name: str, command: click.Command, mark: str) -> list[str]:
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    options = [one for one in command.params if isinstance(one, click.Option) and one.name not in _COMMON]
    lines = ["", f"{mark} {name}", "", *_help(command.help or "")]
    if isinstance(command, click.Group):
        return lines
    words = [name, *(_metavar(one) for one in arguments), *(["[OPTIONS]"] if options else [])]
    lines += ["", "```text", " ".join(words), "```"]
    rows = [f"- `{_metavar(one)}`: {_about(one)}" for one in arguments]
    rows += [f"- {_spelled(one)}: {_about(one)}" for one in options]
    return [*lines, *([""] if rows else []), *rows]


_COMMON = ("help", "install_completion", "show_completion")


def _help(text: str) -> list[str]:
    """Returns a help text as Markdown: commands that it gives as examples become blocks of code."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        said, found, example = paragraph.partition("Example: ")
        code = example if found else inspect.cleandoc(paragraph) if paragraph.startswith("    ") else ""
        if not found:
            said = "" if code else paragraph
        code = re.sub(r"\n\s*--", " --", code)  # a long example goes on in its next line
        if code and not said.strip() and lines and lines[-1] == "```":  # goes on in the block before
            lines[-1:] = [*code.splitlines(), "```"]
            continue
        lines += [""] if lines else []
        lines += said.splitlines() if said else []
        lines += ["", "```bash", *code.splitlines(), "```"] if said and code else []
        lines += ["```bash", *code.splitlines(), "```"] if code and not said else []
    return lines


def _metavar(parameter: click.Parameter) -> str:
    return parameter.metavar or (parameter.name or "").upper()


def _spelled(option: click.Option) -> str:
    spelled = [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{one}`" if option.is_flag else f"`{one} {_value(option)}`" for one in spelled)


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    named = {click.types.IntRange: "NUMBER", click.types.FloatRange: "NUMBER", click.types.IntParamType: "NUMBER"}
    return named.get(type(option.type), "PATH" if "path" in type(option.type).__name__.lower() else "TEXT")


def _about(parameter: click.Parameter) -> str:
    text = str(getattr(parameter, "help", "") or "")
    kind, default = parameter.type, parameter.default
    facts = ["required"] if parameter.required and isinstance(parameter, click.Option) else []
    if isinstance(kind, click.types.IntRange | click.types.FloatRange):
        bounds = within(kind.min, kind.max, kind.min_open, kind.max_open).removeprefix(" of").strip()
        facts += [bounds] if bounds else []
    if isinstance(default, int | float | str) and not isinstance(default, bool):
        facts.append(f"by default {default}")
    return f"{text} ({'; '.join(facts)})" if facts else text


def main() -> None:
    """Writes both files."""
    JOB_KEYS.write_text(job_keys(), encoding="utf-8")
    COMMANDS.write_text(commands(), encoding="utf-8")


if __name__ == "__main__":
    main()
