"""The plan's guess of what noise costs: between the benchmark's points, and never beyond them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import pytest

from fedtune.server import privacy_losses
from fedtune.server.privacy_losses import MEASURED, expected_losses


@pytest.fixture
def two_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stored = tmp_path / "losses.json"
    stored.write_text(json.dumps({"demo": {"without": 95.0, "lost": [[0.4, 30.0], [0.1, 10.0]]}}))
    monkeypatch.setattr(privacy_losses, "MEASURED", stored)
    privacy_losses._measured.cache_clear()
    yield
    privacy_losses._measured.cache_clear()


@pytest.mark.usefixtures("two_points")
@pytest.mark.parametrize(
    ("noise", "least", "most"),
    [(0.1, 10.0, 10.0), (0.2, 20.0, 20.0), (0.3999, 30.0, 30.0), (0.01, 0.0, 10.0), (9.0, 30.0, 95.0)],
)
def test_a_guess_is_linear_in_the_logarithm_between_points_and_an_interval_beyond(
    noise: float, least: float, most: float
) -> None:
    for rounds in (1, 20):
        (found,) = expected_losses(1.000001 * noise * sqrt(rounds), rounds).values()
        assert found == pytest.approx((least, most), abs=0.01)


def test_the_stored_points_are_losses_of_growing_noise() -> None:
    for task, measured in json.loads(MEASURED.read_text()).items():
        noises = [noise for noise, _ in measured["lost"]]
        assert noises == sorted(noises), task
        assert all(-5 <= points <= measured["without"] for _, points in measured["lost"])
