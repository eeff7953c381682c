"""A guess at what noise will cost a job in quality, from where it was measured.

    losses = expected_losses(share, rounds)         # task -> least and most points of exact match

Over T rounds in which clients agree, their updates add up to T steps and the noise of the rounds' means to √T of them.
So the noise of a job is s/√T, with s the noise of a mean in clips. `benchmarks/privacy` measures the points of exact
match that are lost against the same job without privacy, with the clip that served best, and writes them beside this
module. Between its points the guess is linear in log s/√T; beyond them it is an interval, from 0 to the least of them
or from the most to 100.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import log, sqrt
from pathlib import Path

import numpy as np

MEASURED = Path(__file__).with_name("privacy_losses.json")


def expected_losses(share: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Returns task -> the least and the most points of exact match that such noise is expected to cost there.

    Args:
        share: s, norm of the noise in a round's mean, over the clip.
    """
    noise = share / sqrt(rounds)
    return {task: _interval(noise, points) for task, points in _measured().items()}


def _interval(noise: float, points: Mapping[float, float]) -> tuple[float, float]:
    noises, losses = list(points), list(points.values())
    between = float(np.interp(log(noise), [log(each) for each in noises], losses))
    return (0.0 if noise < noises[0] else between), (100.0 if noise > noises[-1] else between)


@cache
def _measured() -> Mapping[str, Mapping[float, float]]:
    """Returns task -> s/√T, ascending -> points."""
    stored = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {task: dict(sorted(pairs)) for task, pairs in stored.items()}
