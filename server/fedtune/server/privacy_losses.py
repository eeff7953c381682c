"""A guess at what noise will cost a job in quality, from where it was measured.

    losses = expected_losses(share, rounds)         # task -> points of exact match

Over T rounds in which clients agree, their updates add up to T steps and the noise of the rounds' means to √T of them.
So the noise of a job is s/√T, with s the noise of a mean in clips. `benchmarks/privacy` measures the points of exact
match that are lost against the same job without privacy, and writes them beside this module; between its points the
guess is linear in log s/√T, and beyond them it is that of the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import log, sqrt
from pathlib import Path

import numpy as np

MEASURED = Path(__file__).with_name("privacy_losses.json")


def expected_losses(share: float, rounds: int) -> dict[str, float]:
    """Returns task -> points of exact match that such noise cost there, as far as it was measured.

    Args:
        share: s, norm of the noise in a round's mean, over the clip.
    """
    noise = log(share / sqrt(rounds))
    return {
        task: float(np.interp(noise, [log(each) for each in points], list(points.values())))
        for task, points in _measured().items()
    }


@cache
def _measured() -> Mapping[str, Mapping[float, float]]:
    """Returns task -> s/√T, ascending -> points."""
    stored = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {task: dict(sorted(pairs)) for task, pairs in stored.items()}
