"""The packages import only as allowed: core <- strategies <- server, core <- model <- edge <- client."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from house import ROOT, ROOTS, imports, longest, modules, within

# What each package may import of fedtune, by dotted prefix; the longest prefix that matches a module decides.
ALLOWED = {
    "fedtune.core": ("fedtune.core",),
    "fedtune.demo": ("fedtune.core", "fedtune.demo"),
    "fedtune.data": ("fedtune.core", "fedtune.demo", "fedtune.data"),
    "fedtune.model": ("fedtune.core", "fedtune.demo", "fedtune.data", "fedtune.model"),
    "fedtune.edge": ("fedtune.core", "fedtune.demo", "fedtune.data", "fedtune.model", "fedtune.edge"),
    "fedtune.strategies": ("fedtune.core", "fedtune.strategies"),
    "fedtune.flower": ("fedtune.core", "fedtune.strategies", "fedtune.flower"),
    "fedtune.client": (
        "fedtune.core",
        "fedtune.demo",
        "fedtune.data",
        "fedtune.model",
        "fedtune.edge",
        "fedtune.client",
    ),
    "fedtune.server": (
        "fedtune.core",
        "fedtune.demo",
        "fedtune.data",
        "fedtune.model",
        "fedtune.edge",
        "fedtune.strategies",
        "fedtune.flower",
        "fedtune.server",
    ),
    "fedtune.server.simulation": ("fedtune",),
    "fedtune.api": ("fedtune",),
    "fedtune.server.cli": ("fedtune",),  # the one command calls both sides
}
FOREIGN = {
    "fedtune.core": ("torch", "transformers", "peft", "ray"),
    "fedtune.client.inference": ("torch", "transformers", "peft", "ray"),
    "fedtune.client.live": ("torch", "transformers", "peft", "ray"),
    "fedtune.client.plan": ("torch", "transformers", "peft", "ray"),
    "fedtune.client.onnx": ("torch", "transformers", "peft", "ray"),
    "fedtune.edge.graph_files": ("torch", "transformers", "peft", "ray"),
    "fedtune.edge.pack": ("torch", "transformers", "peft", "ray"),
    "fedtune.edge.pack_contents": ("torch", "transformers", "peft", "ray"),
    "fedtune.edge.pack_facts": ("torch", "transformers", "peft", "ray"),
    "fedtune.strategies": ("torch", "transformers", "peft", "ray"),
    "fedtune.flower": ("torch", "transformers", "peft", "ray"),
}


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=modules())
def test_a_module_imports_only_what_its_layer_may(module: str, path: Path) -> None:
    layer = longest(module, ALLOWED)
    for name in (one.name for one in imports(path)):
        if within(name, "fedtune"):
            assert any(within(name, prefix) for prefix in ALLOWED[layer]), f"{module} imports {name}"
        for prefix, forbidden in FOREIGN.items():
            if within(module, prefix):
                assert not any(within(name, package) for package in forbidden), f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    uses = {
        module: {longest(one.name, known) for one in imports(path) if within(one.name, "fedtune") and not one.deferred}
        for module, path in known.items()
    }
    TopologicalSorter({module: targets - {module} for module, targets in uses.items()}).prepare()


def test_the_namespace_package_has_no_init_of_its_own() -> None:
    assert not [root for root in ROOTS if (ROOT / root / "fedtune" / "__init__.py").exists()]


def test_one_package_knows_flower() -> None:
    knowing = {module for module, path in modules().items() if any(within(one.name, "flwr") for one in imports(path))}
    assert {module for module in knowing if not within(module, "fedtune.flower")} == set()


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("examples/**/*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_examples_import_names_that_exist(path: Path) -> None:
    """mypy does not read them all, and some run for hours before a wrong import would fail."""
    house = modules()
    for name in (one.name for one in imports(path) if within(one.name, "fedtune")):
        module, _, attribute = name.rpartition(".")
        assert name in house or attribute in defined(house[module]), f"{name} does not exist"


def test_a_module_that_benchmarks_share_within_a_folder_has_a_name_that_no_other_folder_uses() -> None:
    """mypy knows it by that name, from benchmarks/siblings; with two it would check against the wrong one."""
    for stub in ROOT.glob("benchmarks/siblings/*.pyi"):
        (shared,) = ROOT.glob(f"benchmarks/*/{stub.stem}.py")
        folder = shared.parent.name
        assert stub.read_text(encoding="utf-8") == f"from benchmarks.{folder}.{stub.stem} import *\n"


def defined(path: Path) -> set[str]:
    """Returns the names that a module binds at its top level."""
    names: set[str] = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names
