"""The client manager's waiting: how long a live round waits, and for which devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.host.clock import Clock
from fedtune.core.job.job_file import load_job
from fedtune.server.live.registrar import ClientManager

NAMES = ("ann", "bob", "cid", "dan")


class Present:
    """A registrar, its board and a clock that only sleep moves; dan is present from second 3 to second 4."""

    def __init__(self) -> None:
        self.now, self.left_out, self.states = 0.0, 0, list[str]()
        self.board = SimpleNamespace(working=lambda state: self.states.append(state))

    def present(self, grid: object) -> dict[str, int]:
        return {name: node for node, name in enumerate(NAMES) if name != "dan" or 3.0 <= self.now < 4.0}

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def manager(self) -> ClientManager:
        registrar: Any = self
        grid: Any = None
        job = load_job(None, ["federation.clients_per_round=1.0"])
        clock = Clock(lambda: self.now, lambda: self.now, self.sleep)
        return ClientManager(grid, registrar, job, set(NAMES), 60.0, clock)


def test_only_the_first_round_waits_for_everybody() -> None:
    registrar = Present()
    manager = registrar.manager()
    assert set(manager(None)) == set(NAMES)
    assert registrar.now == pytest.approx(3.0, abs=0.3)
    assert registrar.states[0] == "waiting for devices: 3 of 4 are there"
    registrar.now = 5.0
    assert set(manager(None)) == {"ann", "bob", "cid"}
    assert registrar.now == 5.0


def test_what_a_round_waits_for_says_how_many_refuse() -> None:
    registrar = Present()
    registrar.left_out = 2
    registrar.manager()(None)
    assert registrar.states[0] == "waiting for devices: 3 of 4 are there, 2 more refuse or sit out"
