"""Checks the prose of the project, in Markdown, docstrings, comments and messages, for words that it does not use.

    python tools/prose.py [PREFIX...]

The project's own list says what to write instead; proselint looks for archaisms, clichés and the like. Code in
Markdown is not prose, and neither is a string without a space. With PREFIXes, only the paths that begin with one of
them are read. The exit status is 1 if there is an offence.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proselint.checks import __register__  # type: ignore[import-untyped]
from proselint.config import Config  # type: ignore[import-untyped]
from proselint.registry import CheckRegistry  # type: ignore[import-untyped]
from proselint.tools import LintFile  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]

OWN = (Path(__file__), ROOT / "tests" / "unit" / "test_prose.py")

# The demo's texts speak of doors, seats and workshops.
DEMO = ROOT / "core" / "fedtune" / "demo"
HOUSEHOLD_TEXTS = tuple(
    DEMO / name for name in ("base/README.md", "corpus.py", "federated_skills.py", "public_skills.py", "vocabulary.py")
)

# A case-insensitive pattern, and what to write instead.
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
    r"(Wh(?:at|o|ose|oever|atever|ether|y)|Those|Of|Nobody|Everybody|Nor|(?:As|So) (?:much|many)|Told|It worked)\b"
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
    """A piece of prose: its first line, its text, and whether it is a docstring."""

    line: int
    text: str
    docstring: bool = False


@dataclass(frozen=True)
class Offence:
    """A line in a file, whose path is relative to the project's root, and the problem there."""

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
    """Registers proselint's checks, which proselint does not do by itself."""
    CheckRegistry().register_many(__register__)


def proselint_offences(piece: Prose) -> Iterator[tuple[int, str]]:
    """Yields the line and problem of each of proselint's findings in `piece`."""
    config = Config(max_errors=1000, checks=dict.fromkeys(PROSELINT, True))
    if piece.text.strip():
        for found in LintFile("prose", piece.text).lint(config):
            end = found.check_result.span[1] - 1  # proselint puts a newline before the text
            if not piece.text[end : end + 1].isalnum():  # it finds "for ever" in "for everybody"
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

    Ignored files are left out, and so are this one and its test, which contain the banned words, and the demo's texts.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(
        path for name in listed.splitlines() if (path := ROOT / name).exists() and path not in (*OWN, *HOUSEHOLD_TEXTS)
    )


def main() -> int:
    """Prints the offences and returns the exit status."""
    register()
    prefixes = tuple(sys.argv[1:]) or ("",)
    paths = (path for path in files() if path.relative_to(ROOT).as_posix().startswith(prefixes))
    found = [offence for path in paths for offence in offences(path)]
    for offence in found:
        print(offence)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
