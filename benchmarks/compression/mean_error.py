"""How far is the decoded mean from the true one, by cohort size and bits, and does a range that follows both pay?

The relative squared error ‖decoded - mean‖²/‖mean‖² of dense maskable updates in one round, without error feedback.
Updates are heavy-tailed and of uneven scale over modules; half of each one's energy is common to all clients. The clip
is the adaptive one after it has settled; the error of clipping alone is in the last column. The baseline is the same
chain with the fixed range of 3 standard deviations.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from tables import publish

from fedtune.core.codec import Ring
from fedtune.core.codec.clipping import HEADROOM, clip_factor, finite_norm
from fedtune.core.codec.quantization import dequantize_sum, public_range, quantize
from fedtune.core.codec.rotation import rotate, rotated_size, unrotate

COUNT = 50_000
MODULES = 50
COHORTS = (10, 100, 1000)
BITS = (1, 2, 3, 4, 8)
FIXED_RANGE = 3.0


def update_of(client: int) -> np.ndarray:
    """Returns the common part of the cohort's updates plus a part of the client's own with the same energy."""
    scales = np.exp(np.random.default_rng(1).normal(0, 0.7, MODULES)).repeat(COUNT // MODULES)
    common, own = (np.random.default_rng(seed).standard_t(5, COUNT) for seed in (2, 1000 + client))
    strength = np.random.default_rng(5000 + client).uniform(0.7, 1.3)
    return (1e-3 * strength * scales * (common + own) / sqrt(2)).astype(np.float32)


def clip_of(cohort: int) -> float:
    return HEADROOM * float(np.mean([finite_norm(update_of(client)) for client in range(cohort)]))


def errors_of(cohort: int, bits: int, clip: float) -> tuple[float, float, float]:
    """Returns relative squared errors: of the range that follows n and bits, of the fixed range, of clipping alone."""
    size = rotated_size(COUNT)
    bounds = (public_range(clip, size, bits, cohort), FIXED_RANGE * clip / sqrt(size))
    truth = np.zeros(COUNT)
    clipped = np.zeros(COUNT)
    sums = [np.zeros(size, dtype=np.uint32) for _ in bounds]
    ring = Ring(bits, cohort)
    for client in range(cohort):
        update = update_of(client)
        shortened = update * np.float32(clip_factor(finite_norm(update), clip))
        truth += update
        clipped += shortened
        rotated = rotate(shortened, 0)
        sums = [
            ring.add(total, quantize(rotated, bound, bits, client)) for total, bound in zip(sums, bounds, strict=True)
        ]
    decoded = [
        unrotate(dequantize_sum(total, bound, bits, cohort), COUNT, 0)
        for total, bound in zip(sums, bounds, strict=True)
    ]
    energy = float(np.square(truth).sum())
    follows, fixed, clipping = (float(np.square(value - truth).sum()) / energy for value in (*decoded, clipped))
    return follows, fixed, clipping


def main() -> None:
    rows = []
    for cohort in COHORTS:
        clip = clip_of(cohort)
        for bits in BITS:
            follows, fixed, clipping = errors_of(cohort, bits, clip)
            bytes_each = Ring(bits, cohort).width / 8
            rows.append(
                [f"{cohort}", f"{bits}", f"{bytes_each:.2f}", *(f"{e:.1e}" for e in (follows, fixed, clipping))]
            )
    publish(
        __file__,
        "How far is the decoded mean from the true one, by cohort size and bits?",
        ["n", "b", "ring bytes a coordinate", "range of the codec", "range 3", "clipping alone"],
        rows,
    )


if __name__ == "__main__":
    main()
