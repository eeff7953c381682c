"""Reads the prose of the project for words and openings that it does not use: Markdown, docstrings, comments, messages.

    python tools/prose.py [PREFIX...]

The project's own list names what to write instead; proselint looks for archaisms, clichés and the like. Code in
Markdown is not prose, and neither is a string without a space. Exits with 1 where a clean path, or one that begins with
a PREFIX, has an offence; other paths are counted only.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proselint.checks import __register__  # type: ignore[import-untyped]
from proselint.config import Config  # type: ignore[import-untyped]
from proselint.registry import CheckRegistry  # type: ignore[import-untyped]
from proselint.tools import LintFile  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]

OWN = (Path(__file__), ROOT / "tests" / "unit" / "test_prose.py")

# Paths whose prose is clean and stays so, by prefix.
CLEAN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "benchmarks/",
    "client/",
    "core/fedtune/core/",
    "core/fedtune/data/",
    "core/fedtune/demo/households.py",
    "core/fedtune/demo/pretrain.py",
    "core/fedtune/demo/skills.py",
    "core/fedtune/model/",
    "docs/",
    "examples/",
    "server/",
    "strategies/",
    "tests/",
    "tools/",
)

# A pattern, read without regard to case, and what to write instead.
BANNED = {
    r"whom": "who, which, or another sentence",
    r"anew|afresh": "again, or new",
    r"strik(?:e|es|ing)|struck": "removes, revokes",
    r"dawdl\w+": "slow, late",
    r"for ever": "without end, permanent",
    r"strangers?": "unauthenticated connections, unknown devices",
    r"knock(?:s|ed|ing)?": "connects",
    r"greet(?:s|ed|er|ers|ing|ings)?": "registration, registers",
    r"lanes?": "auxiliary sum",
    r"seat(?:s|ed)?": "client index",
    r"(?<!GPU )box(?:es)?": "encrypted share",
    r"readouts?": "language-model head",
    r"overdue": "stale updates",
    r"wish(?:es)?": "constraints, requests",
    r"workshops?": "simulation context",
    r"lineups?": "tier assignment",
    r"attendance": "client manager",
    r"shelf|shelves": "model registry",
    r"in secret": "under secure aggregation",
    r"doors?": "endpoint",
    r"tak(?:es?|ing) over|took over": "adopts, copies, replaces",
    r"comes? to nothing": "has no result",
    r"as good as": "nearly",
    r"straddl\w+": "spans",
    r"vouch\w*": "proves, confirms",
    r"learnt": "learned",
}
OPENERS = re.compile(
    r"(What|Those|Of|Who|Whoever|Whatever|Whether|Why|Nobody|Everybody|As much|So many|Told|It worked)\b"
)

# The checks of proselint that suit technical prose.
PROSELINT = (
    "archaism",
    "cliches",
    "hedging",
    "industrial_language",
    "malapropisms",
    "mixed_metaphors",
    "mondegreens",
    "nonwords",
    "oxymorons",
    "psychology",
    "redundancy",
)

_BANNED = re.compile("|".join(rf"(?P<p{number}>\b(?:{one})\b)" for number, one in enumerate(BANNED)), re.IGNORECASE)
_ADVICE = list(BANNED.values())
_CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)|<!--.*?-->|`[^`]+`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Prose:
    """A piece of prose: the line on which it begins, its text, and whether it is a docstring."""

    line: int
    text: str
    docstring: bool = False


@dataclass(frozen=True)
class Offence:
    """A place in a file, given from the root of the project, and what is wrong there."""

    path: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.problem}"


def of_markdown(text: str) -> Iterator[Prose]:
    """Yields the document as one piece, with blanks in the place of its code and links."""
    yield Prose(1, _CODE.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text))


def of_python(text: str) -> Iterator[Prose]:
    """Yields a module's docstrings, its comments, and those of its strings that have a space."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (node in docstrings or " " in node.value):
            yield Prose(node.lineno, node.value, node in docstrings)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Prose(token.start[0], token.string.removeprefix("#"))


def own_offences(piece: Prose) -> Iterator[tuple[int, str]]:
    """Yields the line and problem of each banned word in `piece`, and of a docstring's opening."""
    for found in _BANNED.finditer(piece.text):
        advice = _ADVICE[int((found.lastgroup or "p0")[1:])]
        yield piece.line + piece.text.count("\n", 0, found.start()), f"{found.group()!r}: write {advice}"
    if piece.docstring and (opening := OPENERS.match(piece.text)):
        yield piece.line, f"a docstring that opens with {opening.group()!r}: write a sentence with subject and verb"


def register() -> None:
    """Makes proselint's checks known to it, which it does not do by itself."""
    CheckRegistry().register_many(__register__)


def proselint_offences(piece: Prose) -> Iterator[tuple[int, str]]:
    """Yields the line and problem of each of proselint's findings in `piece`."""
    config = Config(max_errors=1000, checks=dict.fromkeys(PROSELINT, True))
    if piece.text.strip():
        for found in LintFile("prose", piece.text).lint(config):
            end = found.check_result.span[1] - 1  # proselint puts a newline before the text
            if not piece.text[end : end + 1].isalnum():  # it takes the start of "for everybody" for "for ever"
                yield piece.line + found.pos[0] - 1, found.check_result.message


def offences(path: Path) -> list[Offence]:
    """Returns every offence in the Markdown or Python file at `path`, by line."""
    text = path.read_text(encoding="utf-8")
    pieces = list(of_python(text) if path.suffix == ".py" else of_markdown(text))
    name = path.relative_to(ROOT).as_posix()
    found = [Offence(name, *one) for piece in pieces for one in (*own_offences(piece), *proselint_offences(piece))]
    return sorted(found, key=lambda one: one.line)


def files() -> list[Path]:
    """Returns the Markdown and Python files of the project, in the order of their names.

    Ignored files are left out, and so are this one and its test, which name what they look for.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(path for name in listed.splitlines() if (path := ROOT / name).exists() and path not in OWN)


def main() -> int:
    """Prints the offences of clean paths, and counts of the others by folder; returns the exit status."""
    register()
    held = (*CLEAN, *sys.argv[1:])
    found = [one for path in files() for one in offences(path)]
    failing = [one for one in found if one.path.startswith(held)]
    others = Counter(one.path.rpartition("/")[0] for one in found if not one.path.startswith(held))
    for folder, count in sorted(others.items()):
        print(f"{folder or '.'}: {count} (not held to it yet)")
    for offence in failing:
        print(offence)
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
