"""The options that the `fedtune server` commands share, and the server that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # the class itself is imported when a command runs
    from fedtune.server.live.server_home import ServerHome

Home = Annotated[
    Path | None,
    typer.Option("--home", envvar="FEDTUNE_SERVER_HOME", help="The server's folder; by default ~/.fedtune/server."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def open_server(home: Path | None) -> ServerHome:
    """Returns the server of a folder, or of the default one.

    Raises:
        InputError: there is none.
    """
    from fedtune.server.live.server_home import ServerHome, default_home

    return ServerHome(home or default_home())
