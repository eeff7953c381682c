"""A guess at what noise will cost a job in quality, from where it was measured.

    losses = expected_losses(share, rounds)         # task -> least and most points of exact match

Over T rounds in which clients agree, their updates add up to T steps and the noise of the rounds' means to √T of them.
So the noise of a job is s/√T, with s the noise of a mean in clips. `benchmarks/privacy` measures the points of exact
match that are lost against the same job without privacy, with the clip that served best, and writes them beside this
module. Between its points the guess is linear in log s/√T; beyond them it is an interval, from 0 to the least of them
or from the most to all points that the job without privacy has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log, sqrt
from pathlib import Path

import numpy as np

MEASURED = Path(__file__).with_name("privacy_losses.json")


@dataclass(frozen=True)
class _Measured:
    """The measurements of a task.

    Args:
        without: points of exact match without privacy.
        lost: (s/√T, points that it costs), ascending.
    """

    without: float
    lost: tuple[tuple[float, float], ...]


def expected_losses(share: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Returns task -> the least and the most points of exact match that such noise is expected to cost there.

    Args:
        share: s, norm of the noise in a round's mean, over the clip.
    """
    noise = share / sqrt(rounds)
    return {task: _interval(noise, measured) for task, measured in _measured().items()}


def _interval(noise: float, measured: _Measured) -> tuple[float, float]:
    noises, losses = zip(*measured.lost, strict=True)
    between = float(np.interp(log(noise), [log(each) for each in noises], losses))
    return (0.0 if noise < noises[0] else between), (measured.without if noise > noises[-1] else between)


@cache
def _measured() -> Mapping[str, _Measured]:
    stored = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {
        task: _Measured(found["without"], tuple((noise, points) for noise, points in sorted(found["lost"])))
        for task, found in stored.items()
    }
