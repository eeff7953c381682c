"""The option --home of a device's commands, and the device that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # the class is imported when a command runs
    from fedtune.client.live.device_home import ClientHome

Home = Annotated[
    Path | None,
    typer.Option("--home", envvar="FEDTUNE_CLIENT_HOME", help="The device's folder; by default ~/.fedtune/client."),
]


def open_device(home: Path | None) -> ClientHome:
    """Returns the device of a folder."""
    from fedtune.client.live.device_home import ClientHome, default_home

    return ClientHome(home or default_home())
