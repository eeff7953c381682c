"""Fixtures of live fleets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_helpers import Fleet, MakeFleet, MakeProxy, Proxy

from fedtune.core.host.process import prepare_environment

prepare_environment()


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """Gives make_fleet(devices=2, ...), which makes a fleet whose processes end with the test."""
    fleets: list[Fleet] = []

    def make(devices: int, **settings: Any) -> Fleet:
        folder = tmp_path / f"fleet-{len(fleets)}"
        folder.mkdir()
        fleets.append(Fleet(folder, devices, **settings))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


@pytest.fixture
def make_proxy() -> Iterator[MakeProxy]:
    """Gives make_proxy(), which makes a network between devices and their server that can be cut and slowed."""
    proxies: list[Proxy] = []

    def make() -> Proxy:
        proxies.append(Proxy())
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()
