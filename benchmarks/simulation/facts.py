"""The parts of every table of measurements: its rows, and the sentence about machine, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedtune.core.host.process import versions

CPU_FACTS = Path("/proc/cpuinfo")
_GIB = 1 << 30


def machine_facts(program: str, arguments: Sequence[str]) -> str:
    """Returns command line, date, processor, memory and versions as Markdown."""
    stated = ", ".join(f"{package} {version}" for package, version in versions().items())
    return (
        f"`{shlex.join(['python', program, *arguments])}` on {datetime.date.today():%Y-%m-%d}: "
        f"{os.cpu_count()} cores of {_processor()}, {psutil.virtual_memory().total / _GIB:.0f} GiB; {stated}."
    )


def _processor() -> str:
    lines = CPU_FACTS.read_text(encoding="utf-8").splitlines() if CPU_FACTS.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown_row(cells: Sequence[str]) -> str:
    """Formats cells as a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def write_table(path: Path, title: str, program: str, lines: Sequence[str], explanation: str) -> None:
    """Writes a table of Markdown lines, with the facts about its making and the program's explanation."""
    text = [
        f"# {title}",
        machine_facts(program, sys.argv[1:]),
        "\n".join(lines),
        explanation.partition("\n\n")[2].strip("\n"),
    ]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
