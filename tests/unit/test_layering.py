"""The house stays in order: core <- strategies <- server, core <- model <- client; simulation sees both sides."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = ("core", "strategies", "client", "server")

# What each package may import of fedtune, by dotted prefix; the longest prefix that matches a module decides.
ALLOWED = {
    "fedtune.core": ("fedtune.core",),
    "fedtune.demo": ("fedtune.core", "fedtune.demo"),
    "fedtune.data": ("fedtune.core", "fedtune.demo", "fedtune.data"),
    "fedtune.model": ("fedtune.core", "fedtune.demo", "fedtune.data", "fedtune.model"),
    "fedtune.strategies": ("fedtune.core", "fedtune.strategies"),
    "fedtune.flower": ("fedtune",),
    "fedtune.client": (
        "fedtune.core",
        "fedtune.demo",
        "fedtune.data",
        "fedtune.model",
        "fedtune.flower",
        "fedtune.client",
    ),
    "fedtune.server": (
        "fedtune.core",
        "fedtune.demo",
        "fedtune.data",
        "fedtune.model",
        "fedtune.strategies",
        "fedtune.flower",
        "fedtune.server",
    ),
    "fedtune.server.simulation": ("fedtune",),
    "fedtune.server.cli": ("fedtune",),  # the one command stands in front of both sides
}
FOREIGN = {
    "fedtune.core": ("torch", "transformers", "peft", "flwr", "ray"),
    "fedtune.client.inference": ("torch", "transformers", "peft", "flwr", "ray"),
    "fedtune.strategies": ("torch", "transformers", "peft", "ray", "flwr"),
    "fedtune.flower": ("torch", "transformers", "peft", "ray"),
}


def modules() -> Iterator[tuple[str, Path]]:
    for root in ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_its_layer_may(module: str, path: Path) -> None:
    layer = max((prefix for prefix in ALLOWED if within(module, prefix)), key=len)
    for name in imports(path):
        if within(name, "fedtune"):
            assert any(within(name, prefix) for prefix in ALLOWED[layer]), f"{module} imports {name}"
        for prefix, forbidden in FOREIGN.items():
            if within(module, prefix):
                assert not any(within(name, package) for package in forbidden), f"{module} imports {name}"


def test_the_namespace_package_has_no_init_of_its_own() -> None:
    assert not [root for root in ROOTS if (ROOT / root / "fedtune" / "__init__.py").exists()]
