"""An audit of sums: the best test for one client's presence in them tells no more than ρ allows, and nearly as much.

A canary is one client's whole update, as long as the clip allows, along a direction that the auditor knows. Its score
is the decoded mean along that direction, by which the presence of the canary is as plain as noise of the deviation σ
makes it: the scores with and without it lie √(2ρ) deviations apart, if all is as promised (Dong, Roth and Su, "Gaussian
differential privacy", 2022). Without noise, or with half of its variance, they lie too far apart.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest

from fedtune.core.codec.maskable import RoundContext
from fedtune.core.codec.noised import NoisedCodec
from fedtune.core.privacy.discrete_gaussian import Variance
from fedtune.core.privacy.mechanism import Noise

COUNT, CLIENTS, RHO, TRIALS = 64, 3, 0.5, 2000
CONTEXT = RoundContext(seed=3, count=COUNT, clip=1.0, n_max=CLIENTS)
APART = sqrt(2 * RHO)
DIRECTION = np.full(COUNT, 1 / sqrt(COUNT), dtype=np.float32)


class Weakened(NoisedCodec):
    """A codec whose devices add less than the noise that they should."""

    share = 1.0

    def noise(self, context: RoundContext) -> Noise:
        noise = super().noise(context)
        return replace(noise, variance=Variance(max(1, int(noise.variance.parts * self.share))))


def distance(codec: NoisedCodec) -> float:
    """Returns how many deviations the canary's scores lie from 0, where those of sums without it lie."""
    found = []
    for trial in range(TRIALS):
        updates = [DIRECTION, 0 * DIRECTION, 0 * DIRECTION]
        parts = [codec.encode(update, CLIENTS * trial + index + 1, CONTEXT) for index, update in enumerate(updates)]
        total = codec.add(codec.add(parts[0], parts[1], CONTEXT), parts[2], CONTEXT)
        found.append(float(codec.decode_sum(total, CLIENTS, CONTEXT).update @ DIRECTION))
    return float(np.mean(found) / np.std(found))


def test_a_canary_is_no_plainer_than_rho_allows_and_the_noise_is_not_wasted() -> None:
    assert 0.8 * APART < distance(NoisedCodec(RHO, CLIENTS)) < 1.07 * APART


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_audit_notices_half_of_the_noise_and_none(share: float) -> None:
    weakened = Weakened(RHO, CLIENTS)
    object.__setattr__(weakened, "share", share)
    assert distance(weakened) > 1.13 * APART
