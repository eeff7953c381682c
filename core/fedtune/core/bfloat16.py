"""Rounding to bfloat16 in numpy, which has no such type: the upper half of a float32."""

from __future__ import annotations

import numpy as np

from fedtune.core.adapter.layout import Vector

_LOWER_BITS = 16


def round_to_bfloat16(values: Vector) -> Vector:
    """Returns the nearest bfloat16 values, ties to even, as float32 of the same shape; all values must be finite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = (1 << (_LOWER_BITS - 1)) - 1
    rounded = (bits + (half + (bits >> _LOWER_BITS & 1))) >> _LOWER_BITS << _LOWER_BITS
    return rounded.astype(np.uint32, copy=False).view(np.float32)
