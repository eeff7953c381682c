"""Fixtures of small federations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation_helpers import FinishedRun, Simulate, run, small_job

from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate as simulate_with_pictures
from fedtune.server.simulation.simulation_context import Wrap


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    """Gives a function that runs a small federation in tmp_path/NAME and returns its summary."""

    def start(*overrides: str, name: str = "run", wrap: Wrap | None = None) -> dict[str, Any]:
        return run(small_job(*overrides), tmp_path / name, wrap=wrap)

    return start


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Runs the small federation undisturbed, with its report's pictures, as the reference for disturbed runs."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return FinishedRun(path, simulate_with_pictures(small_job(), path, Silent()))
