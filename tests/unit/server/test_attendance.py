"""How long a live round waits, and for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.job.job_file import load_job
from fedtune.server.live import client_manager as client_manager
from fedtune.server.live.client_manager import ClientManager

NAMES = ("ann", "bob", "cid", "dan")


class Fixture:
    """A greeter, its board and a clock that only sleep moves; dan comes at second 3 and is away from second 4 on."""

    def __init__(self) -> None:
        self.now, self.left_out, self.states = 0.0, 0, list[str]()
        self.board = SimpleNamespace(working=lambda state: self.states.append(state))

    def present(self, grid: object) -> dict[str, int]:
        return {name: node for node, name in enumerate(NAMES) if name != "dan" or 3.0 <= self.now < 4.0}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_only_the_first_round_waits_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture: Any = Fixture()
    monkeypatch.setattr(client_manager, "time", fixture)
    grid: Any = None
    attend = ClientManager(grid, fixture, load_job(None, ["federation.clients_per_round=1.0"]), set(NAMES), 60.0)
    assert set(attend(grid)) == set(NAMES)
    assert fixture.now == pytest.approx(3.0, abs=0.3)
    assert fixture.states[0] == "waiting for devices: 3 of 4 are there"
    fixture.now = 5.0
    assert set(attend(grid)) == {"ann", "bob", "cid"}
    assert fixture.now == 5.0


def test_what_a_round_waits_for_says_how_many_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture: Any = Fixture()
    fixture.left_out = 2
    monkeypatch.setattr(client_manager, "time", fixture)
    grid: Any = None
    ClientManager(grid, fixture, load_job(None, ["federation.clients_per_round=1.0"]), set(NAMES), 60.0)(grid)
    assert fixture.states[0] == "waiting for devices: 3 of 4 are there, 2 more refuse or sit out"
