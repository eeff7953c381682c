"""Output of a benchmark's table: printed, and written beside the program as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def publish(
    program: str, question: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    """Prints the table and writes it beside the program as .md, with the question above and the notes below."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    print(table)
    path = Path(program)
    path.with_suffix(".md").write_text(
        "\n\n".join([f"# {question}", f"`python benchmarks/{path.parent.name}/{path.name}`", table, *notes]) + "\n"
    )
