"""The reference of job keys and commands is the one that the code gives now, and leaves nothing out."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click
import pytest
import reference
import typer

from fedtune.core.job import contradictions
from fedtune.server.cli import app


@pytest.mark.parametrize(
    ("path", "written"), [(reference.JOB_KEYS, reference.job_keys), (reference.COMMANDS, reference.commands)]
)
def test_a_reference_is_the_one_that_the_code_gives(path: Path, written: Any) -> None:
    assert path.read_text(encoding="utf-8") == written(), "run `make reference`"


def test_every_sentence_with_which_a_job_is_refused_for_a_contradiction_is_in_the_reference() -> None:
    reached: set[int] = set()

    def within(frame: FrameType, event: str, argument: Any) -> Any:
        reached.add(frame.f_lineno)
        return within

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        return within if frame.f_code.co_filename == contradictions.__file__ else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        reference.refusals()
    finally:
        sys.settrace(before)
    tree = ast.parse(Path(contradictions.__file__).read_text(encoding="utf-8"))
    saying = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Return | ast.Expr) and any(isinstance(part, ast.JoinedStr) for part in ast.walk(node))
    ]
    assert len(saying) > 30
    for node in saying:
        assert not reached.isdisjoint(range(node.lineno, (node.end_lineno or node.lineno) + 1)), ast.unparse(node)


def test_the_reference_has_every_command() -> None:
    def names(command: click.Command, name: str) -> list[str]:
        inner = command.commands.items() if isinstance(command, click.Group) else ()
        return [name, *(deeper for word, sub in inner for deeper in names(sub, f"{name} {word}"))]

    headings = {line.lstrip("# ") for line in reference.commands().splitlines() if line.startswith("##")}
    assert {*names(typer.main.get_command(app), "fedtune")} - {"fedtune"} == headings
    assert len(headings) > 30


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((1, 8), " from 1 to 8"),
        ((0, None), " of at least 0"),
        ((0, None, True), " above 0"),
        ((0, 1, False, True), " of at least 0 and below 1"),
        ((0, 1000, True), " above 0 and at most 1,000"),
        ((None, None), ""),
    ],
)
def test_bounds_are_said_in_words(bounds: Any, words: str) -> None:
    assert reference.within(*bounds) == words
