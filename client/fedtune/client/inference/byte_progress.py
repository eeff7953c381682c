"""How far bytes have come: a bar on a terminal, a line at every tenth when piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_PARTS = 10


@contextmanager
def showing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Something to tell the bytes that are there, and those there will be."""
    if sys.stderr.isatty():
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        shown = 0

        def tell(done: int, total: int) -> None:
            nonlocal shown
            part = _PARTS * done // max(total, 1)
            if part > shown:
                shown = part
                print(f"{what}: {done:,} of {total:,} bytes", file=sys.stderr, flush=True)

        yield tell
