"""The command lines in the documents have commands, options and job keys that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer
from house import ROOT
from reference import keys

from fedtune.server.cli import app

BESIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*/README.md"))]
OTHERS = ("commands.md", "job-keys.md", "wire-protocol.md")  # two are written from the code; one has no command lines
DOCUMENTS = [*BESIDE, *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OTHERS)]
CODE = re.compile(r"```bash\n(.*?)```|`(fedtune [^`]+|--set [^`]+)`", re.DOTALL)
COMMAND = typer.main.get_command(app)
KEYS = {key.path for key in keys()}
KEY = re.compile(r"([a-z_]+\.[a-z_]+)=")


def lines(document: Path) -> Iterator[list[str]]:
    """Yields the words of each command line of fedtune's, and of each list of options alone."""
    for block, span in CODE.findall(document.read_text(encoding="utf-8")):
        for line in (block or " ".join(span.split())).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("fedtune", "--set"):
                yield words


def problem(words: list[str]) -> str | None:
    """Returns the word that the command line does not have; None where there is none."""
    command, rest = COMMAND, words
    if words[0] == "fedtune":
        rest = words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-") and rest[0].islower():
            if rest[0] not in command.commands:
                return rest[0]
            command, rest = command.commands[rest[0]], rest[1:]
        known = {
            "--help",
            *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)),
        }
        if wrong := [word for word in rest if re.match(r"--?[a-z]", word) and word not in known]:
            return wrong[0]
    settings = [value for option, value in pairwise(rest) if option == "--set"]
    return next((one for one in settings if (key := KEY.match(one)) and key[1] not in KEYS), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_line_of_a_document_exists(document: Path) -> None:
    assert not [(words, wrong) for words in lines(document) if (wrong := problem(words))]


def test_there_are_command_lines_to_check() -> None:
    assert sum(1 for document in DOCUMENTS for _ in lines(document)) > 100


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("fedtune simulate job.toml --set federation.rounds=3", None),
        ("fedtune simulated job.toml", "simulated"),
        ("fedtune server begin", "begin"),
        ("fedtune simulate --rounds 3", "--rounds"),
        ("fedtune simulate --set federation.round=3", "federation.round=3"),
        ("--set federation.round=3", "federation.round=3"),
    ],
)
def test_a_word_that_no_command_has_is_found(line: str, wrong: str | None) -> None:
    assert problem(shlex.split(line)) == wrong
