"""Draws the project's packages ("rooms") and the imports between them ("arrows") into docs/architecture.md.

An arrow leads from the package that imports to the package that is imported; it is dashed if all these imports happen
inside functions. `make house` rewrites the drawing. tests/unit/test_architecture.py fails if drawing and code differ,
and tests/unit/test_layering.py if an arrow has a forbidden direction.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOTS = ("core", "strategies", "client", "server")
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- {0}: written by `make house` -->"
END = "<!-- end of {0} -->"

# Frames of the drawing: a room is in the frame of the longest prefix that matches its name.
FRAMES = (
    "fedtune.core",
    "fedtune.data",
    "fedtune.demo",
    "fedtune.model",
    "fedtune.edge",
    "fedtune.strategies",
    "fedtune.flower",
    "fedtune.client",
    "fedtune.api",
    "fedtune.server",
    "fedtune.server.simulation",
)


@dataclass(frozen=True)
class Import:
    """The target of an import, a module or a name in one, and whether the import happens inside a function."""

    name: str
    deferred: bool


def modules() -> dict[str, Path]:
    """Returns every module of the project by its dotted name; a package's name stands for its `__init__.py`."""
    found = {}
    for root in ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[Import]:
    """Returns the imports of the module at `path`.

    Raises ValueError for a relative import, since the project has none.
    """
    return list(_imports(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), deferred=False))


def _imports(node: ast.AST, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, deferred) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level or node.module is None:
            raise ValueError(f"line {node.lineno}: relative import")
        yield from (Import(f"{node.module}.{alias.name}", deferred) for alias in node.names)
    waits = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_only(node)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, waits)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def within(name: str, prefix: str) -> bool:
    """Returns whether the dotted `name` is `prefix` or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def longest(name: str, prefixes: Iterable[str]) -> str:
    """Returns the longest of the dotted `prefixes` that `name` lies within."""
    return max((prefix for prefix in prefixes if within(name, prefix)), key=len)


def rooms() -> dict[str, str]:
    """Returns every package of the project with the first line of its docstring."""
    lines = {}
    for name, path in modules().items():
        if path.name == "__init__.py":
            lines[name] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return lines


def arrows() -> dict[tuple[str, str], bool]:
    """Returns every pair (room that imports, room that is imported), and whether all of its imports are deferred."""
    packages = rooms()
    deferred: dict[tuple[str, str], bool] = {}
    for module, path in modules().items():
        for one in imports(path):
            if within(one.name, "fedtune"):
                arrow = longest(module, packages), longest(one.name, packages)
                if arrow[0] != arrow[1]:
                    deferred[arrow] = deferred.get(arrow, True) and one.deferred
    return dict(sorted(deferred.items()))


def picture(drawn: Mapping[tuple[str, str], bool]) -> str:
    """Returns the arrows as a Mermaid flowchart: rooms are in frames, and arrows between frames are drawn once.

    An arrow between two rooms of one frame is drawn as it is. For rooms in different frames the arrow joins the frames,
    and the table below the picture has the rooms. A frame's first room has the frame's own name.
    """
    framed = defaultdict(list)
    for room in rooms():
        framed[longest(room, FRAMES)].append(room)
    between: dict[tuple[str, str], bool] = {}
    inside: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    for (source, target), deferred in drawn.items():
        ends = longest(source, FRAMES), longest(target, FRAMES)
        if ends[0] == ends[1]:
            inside[ends[0]].append((_node(source), _node(target), deferred))
        else:
            between[ends] = between.get(ends, True) and deferred
    lines = ["flowchart TB"]
    for frame in FRAMES:
        if len(framed[frame]) == 1:
            lines.append(f'    {_frame(frame)}["{frame}"]')
            continue
        lines.append(f'    subgraph {_frame(frame)}["{frame}"]')
        lines.extend(f'        {_node(room)}["{_label(room, frame)}"]' for room in framed[frame])
        lines.extend(f"        {source} {_line(deferred)} {target}" for source, target, deferred in inside[frame])
        lines.append("    end")
    lines.extend(f"    {_frame(a)} {_line(deferred)} {_frame(b)}" for (a, b), deferred in between.items())
    return "\n".join(["```mermaid", *lines, "```"])


def _frame(name: str) -> str:
    return "frame_" + name.removeprefix("fedtune.").replace(".", "_")


def _node(name: str) -> str:
    return name.removeprefix("fedtune.").replace(".", "_")


def _label(room: str, frame: str) -> str:
    return "its own modules" if room == frame else room.removeprefix(f"{frame}.")


def _line(deferred: bool) -> str:
    return "-.->" if deferred else "-->"


def table(drawn: Mapping[tuple[str, str], bool]) -> str:
    """Returns the arrows as a Markdown table: a row for each room; a deferred arrow's target is in italics."""
    lines = ["| room | imports |", "|---|---|"]
    for room in sorted(rooms()):
        targets = [
            f"*{_short(target)}*" if deferred else _short(target)
            for (source, target), deferred in drawn.items()
            if source == room
        ]
        lines.append(f"| `{_short(room)}` | {', '.join(targets) or 'nothing'} |")
    return "\n".join(lines)


def description() -> str:
    """Returns the rooms as a Markdown table: each with the first line of its package's docstring."""
    rows = [f"| `{name}` | {line} |" for name, line in sorted(rooms().items())]
    return "\n".join(["| room | holds |", "|---|---|", *rows])


def _short(room: str) -> str:
    return room.removeprefix("fedtune.")


def parts() -> dict[str, str]:
    """Returns every generated part of docs/architecture.md, keyed by the name in its markers."""
    drawn = arrows()
    return {"rooms": description(), "picture": picture(drawn), "arrows": table(drawn)}


def rewritten(document: str) -> str:
    """Returns `document` with every generated part as the code gives it now.

    Raises ValueError if a part's markers are missing.
    """
    for name, text in parts().items():
        before, found, rest = document.partition(BEGIN.format(name) + "\n")
        _, closed, after = rest.partition(END.format(name))
        if not (found and closed):
            raise ValueError(f"{DOCUMENT.name} has no markers for {name!r}")
        document = f"{before}{found}{text}\n{closed}{after}"
    return document


def main() -> None:
    """Rewrites docs/architecture.md."""
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
