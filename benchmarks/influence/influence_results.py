"""The file of results beside the programs: each program writes the section under its own title."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def write_section(title: str, body: str) -> None:
    """Replaces the section of RESULTS.md that begins with this title, or adds it at the end."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in f"\n{text}".split("\n# ")[1:]}
    sections[title] = body.strip()
    RESULTS.write_text("\n".join(f"# {name}\n\n{part}\n" for name, part in sections.items()), encoding="utf-8")
