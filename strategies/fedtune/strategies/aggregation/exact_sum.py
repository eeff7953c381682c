"""A weighted sum that streams, in memory of one vector, and does not depend on the order of arrival.

Floating-point addition is not associative, so a running float sum would differ with the order in which clients answer,
and a run would not repeat bit for bit. In fixed point it is exact:

    S = Σ_i w_i · rint(x_i · 2^F)        int64, F = FRACTION_BITS
    mean = S / (2^F · Σ_i w_i)           float64, rounded once to float32

Bounds: |x_i| <= MAX_VALUE = 2^4 and Σ w_i <= MAX_WEIGHT = 2^24 give |S| <= 2^(4 + 34 + 24) = 2^62 < 2^63, so the sum
cannot wrap. The step 2^-34 (6e-11) is below the rounding of a float32 of 1e-3, the size of LoRA updates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import UpdateError

FRACTION_BITS = 34
MAX_VALUE = 2.0**4
MAX_WEIGHT = 2**24


class ExactSum:
    """The running sum of weighted vectors of one length."""

    def __init__(self, size: int) -> None:
        self.weight = 0
        self._sum: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)

    def add(self, vector: Vector, weight: int) -> None:
        """Adds weight · vector.

        Args:
            vector: float32, the sum's length.
            weight: at least 1.

        Raises:
            UpdateError: a value is not finite or too large, the length or the weight is wrong; the sum is unchanged.
        """
        self.check(vector, weight)
        scaled = np.multiply(vector, 2.0**FRACTION_BITS, dtype=np.float64)
        np.rint(scaled, out=scaled)
        fixed = scaled.astype(np.int64)
        fixed *= weight
        self._sum += fixed
        self.weight += weight

    def check(self, vector: Vector, weight: int) -> None:
        """Raises UpdateError unless it can be added; see `add`."""
        if vector.shape != self._sum.shape:
            raise UpdateError(f"an update of {vector.size} values; expected {self._sum.size}")
        if weight < 1 or self.weight + weight > MAX_WEIGHT:
            raise UpdateError(f"weight {weight} on top of {self.weight}; expected at least 1 and {MAX_WEIGHT} in all")
        largest = float(np.abs(vector).max(initial=0.0))
        if not largest <= MAX_VALUE:  # also refuses NaN
            raise UpdateError(f"an update with a value of {largest}; expected at most {MAX_VALUE:g}")

    def mean(self) -> Vector:
        """Σ w·x / Σ w as float32; zeros while nothing was added."""
        if self.weight == 0:
            return np.zeros(self._sum.shape, dtype=np.float32)
        return (self._sum / (2.0**FRACTION_BITS * self.weight)).astype(np.float32)
