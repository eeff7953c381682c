"""Fixtures of small federations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation_helpers import Simulate, small_job

from fedtune.server.run_display import Silent


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    """Runs a small federation in tmp_path/NAME and returns its summary."""
    from fedtune.server.simulation.simulate import simulate as run

    def start(*overrides: str, name: str = "run") -> dict[str, Any]:
        return run(small_job(*overrides), tmp_path / name, Silent())

    return start
