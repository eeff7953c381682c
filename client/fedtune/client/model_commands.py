"""`fedtune client pull` and `rollback`: the models and edge packs of a device.

app.command()(pull)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated

import typer

from fedtune.client.device_option import Home, open_device
from fedtune.core.errors import InputError

_PARTS = 10  # parts of a pull, each reported by one line where there is no terminal


def pull(
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A finished job, by default the owner's newest release; or the name of an edge pack."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="int4, int8, fp16 or fp32, by default the smallest available; or edge, for the edge pack of a base.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the version that was pulled as JSON, and nothing else.")
    ] = False,
    home: Home = None,
) -> None:
    """Download a model that the fleet's owner has released, to answer with it, or an edge pack, to train on it.

    A model needs the extra [inference] for fedtune serve and fedtune chat, a pack the extra [edge]; neither needs
    torch. The device trains on its packs from its next start on. It refuses what the owner has not signed, and
    releases from before the one it has. Every file is checked before the new model replaces the old one, which is kept
    for fedtune client rollback. An interrupted pull resumes when it is started again. Examples:

        fedtune client pull

        fedtune client pull first --format fp16

        fedtune client pull SmolLM2-135M --format edge
    """
    from fedtune.client.inference.model_line import ModelLine, PatientLine
    from fedtune.client.inference.model_pull import pull as run
    from fedtune.client.live.device_home import where
    from fedtune.client.live.signed_http import SignedHttp
    from fedtune.core.host.trusted_server import ServerClock
    from fedtune.core.manifest.model_release import RELEASE_NAME
    from fedtune.core.protocol.model_manifest import PACK_FORMAT

    device = open_device(home)
    pack = form == PACK_FORMAT
    if pack and not (job and RELEASE_NAME.fullmatch(job)):
        raise InputError("--format edge: expected the name of an edge pack: fedtune client pull NAME --format edge")
    versions = device.packs(job or "") if pack else device.models
    http = SignedHttp(device.config.server, device.authority, device.node_key, ServerClock())
    try:
        with nullcontext() if quiet or as_json else _showing("pulling") as progress:
            pulled = run(PatientLine(ModelLine(http)), versions, device.owner_key_after, job, form, progress)
    finally:
        http.close()
    path, previous = versions.folder / "current", versions.previous
    if as_json:
        found = {
            "version": pulled.path.name,
            "release": pulled.release.number,
            "path": str(path),
            "received": pulled.received,
            "total": pulled.total,
            "previous": previous.name if previous else None,
        }
        print(json.dumps(found, indent=2))
    elif not quiet:
        print(
            f"{pulled.path.name}, release {pulled.release.number} of the fleet's owner: {pulled.total:,} bytes, "
            f"{pulled.received:,} of them received now; every file checked"
        )
        if pack:
            print(f"train on it: fedtune client start{where(device.path)}; one that runs takes it when it starts again")
        else:
            print(f"answer with it: fedtune serve {path}, or: fedtune chat {path}")


def rollback(home: Home = None) -> None:
    """Return to the model that was current before; a second call undoes the first. Then restart fedtune serve.

    Going back is the device owner's to decide. The next pull installs the fleet's newest release again.
    """
    models = open_device(home).models
    with models.changing():
        path = models.roll_back()
    print(f"{path.name} is the current model again; restart fedtune serve to answer with it")


@contextmanager
def _showing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows progress, to be called with the received and the total bytes.

    It moves a bar on a terminal, and prints a line at every tenth elsewhere.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
