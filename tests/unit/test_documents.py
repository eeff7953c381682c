"""The documents name only things that exist: modules, links, paths, and the labels of secure aggregation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from house import ROOT, longest, modules
from prose import of_python

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = modules()
NAME = re.compile(r"(?<![/\w.-])fedtune(?:\.(?!json|none)\w+)+")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
FOLDERS = ("core", "strategies", "client", "server", "tests", "tools", "benchmarks", "docs", "examples", "deploy")
PATH = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/]")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SYMPTOM = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
LABEL = re.compile(r'F\("([a-z_ ]+)"|KDF\([^"]*(?:""[^"]*)?"([a-z_ ]+)"')

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@cache
def public_names(path: Path) -> frozenset[str]:
    """Returns the names that the module at `path` defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return frozenset(names)


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of `document`."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_names(text: str) -> set[str]:
    """Returns the dotted names in `text` that are no module of the house and no name at the top of one."""
    missing = set()
    for name in set(NAME.findall(text)):
        module = longest(name, [*MODULES, "fedtune"])
        if module == "fedtune":  # the namespace package has no file
            exists = any(other.startswith(f"{name}.") for other in MODULES)
        else:
            exists = module == name or name.removeprefix(f"{module}.").split(".")[0] in public_names(MODULES[module])
        if not exists:
            missing.add(name)
    return missing


@each_document
def test_every_module_that_a_document_names_exists(document: Path) -> None:
    assert not missing_names(document.read_text(encoding="utf-8"))


def test_every_module_that_a_docstring_comment_or_message_names_exists() -> None:
    for path in MODULES.values():
        for piece in of_python(path.read_text(encoding="utf-8")):
            assert not missing_names(piece.text), f"{path}:{piece.line}"


@each_document
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        path = (document.parent / target) if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@each_document
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    for file, name in TEST.findall(document.read_text(encoding="utf-8")):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@each_document
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    for path in set(PATH.findall(document.read_text(encoding="utf-8"))):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_the_glossary_is_in_alphabetical_order_and_has_each_term_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [term.lower() for term in re.findall(r"^- \*\*(.+?)\*\*:", text, re.MULTILINE)]
    assert terms == sorted(set(terms))


def said() -> Iterator[str]:
    """Yields every text of the code, adjacent ones joined; "…" stands for the values that are put into it."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_that_the_troubleshooting_page_explains_is_one_of_the_code() -> None:
    """All that a symptom has beside "…" is in one text of the code."""
    texts = [text.split("…") for text in said() if len(text) > 8]
    symptoms = SYMPTOM.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(symptoms) > 40
    for symptom in symptoms:
        own = [part.strip() for part in symptom.split("…") if len(part.strip()) > 3]
        assert any(all(any(part in text for text in parts) for part in own) for parts in texts), symptom


def test_the_labels_of_secure_aggregation_are_those_of_the_code() -> None:
    document = (ROOT / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
    labels = {label for pair in LABEL.findall(document) for label in pair if label}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "core/fedtune/core/secagg").glob("*.py"))
    called = set(re.findall(r'(?:derive|digest|framed)\([^"]*?(?:b"", )?"([a-z_ ]+)"', code))
    assert labels == called


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1600
