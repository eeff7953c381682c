"""How fast is each step of the codecs on one core, and how much memory does it need?

Processor time of the best of REPEATS runs of one thread. Memory is the step's peak allocation, with its result and
without its input, in multiples of the float32 vector. The targets: quantize + pack at 50 M coordinates/s, a whole
encode of 10 M coordinates in under 1 s and in at most 3 vectors.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
from tables import publish

from fedtune.core.codec import (
    DenseCodec,
    MaskableCodec,
    RingUpdate,
    RoundContext,
    SparseCodec,
    apply,
    encode_change,
    pack,
    select_largest,
    unpack,
)
from fedtune.core.codec.downlink import on_grid
from fedtune.core.codec.quantization import dequantize_sum, quantize
from fedtune.core.codec.rotation import rotate, unrotate

SIZES = (1_000_000, 10_000_000)
REPEATS = 3
BITS, RING_BITS, LEVELS, CLIP, COHORT = 4, 11, 20, 10.0, 100  # 11 bits have room for a hundred times 20

Result = TypeVar("Result")


class Stopwatch:
    """A stopwatch that measures steps on vectors of one size and collects the rows."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: list[list[str]] = []

    def measure(self, name: str, step: Callable[[], Result]) -> Result:
        tracemalloc.start()
        result = step()
        peak = tracemalloc.get_traced_memory()[1] / (4 * self.count)
        tracemalloc.stop()
        best = min(self._seconds(step) for _ in range(REPEATS))
        self.rows.append([f"{self.count:,}", name, f"{best:.3f}", f"{self.count / best / 1e6:.0f}", f"{peak:.2f}"])
        return result

    @staticmethod
    def _seconds(step: Callable[[], object]) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start


def rows_for(count: int) -> list[list[str]]:
    """Measures all steps."""
    watch = Stopwatch(count)
    update = (1e-3 * np.random.default_rng(0).standard_normal(count)).astype(np.float32)
    maskable, dense, sparse = MaskableCodec(BITS), DenseCodec(3), SparseCodec(density=0.1, bits=BITS)

    rotated = watch.measure("rotate", lambda: rotate(update, 0))
    watch.measure("unrotate", lambda: unrotate(rotated, count, 0))
    words = watch.measure("quantize, L = 20", lambda: quantize(rotated, 0.003, LEVELS, 0))
    watch.measure("dequantize a sum", lambda: dequantize_sum(words, 0.003, LEVELS, COHORT))
    packed = watch.measure("pack, 11 bits (n = 100)", lambda: pack(words, RING_BITS))
    watch.measure("unpack, 11 bits", lambda: unpack(packed, RING_BITS, words.size))
    watch.measure("quantize + pack", lambda: pack(quantize(rotated, 0.003, LEVELS, 0), RING_BITS))
    watch.measure("top-k, density 0.1", lambda: select_largest(update, 0.1))
    context = RoundContext(0, count, CLIP, COHORT)
    contribution = watch.measure(
        "maskable encode + pack", partial(_encode_and_pack, maskable, update, context, maskable.ring(context).width)
    )
    watch.measure("maskable decode", partial(maskable.decode_sum, contribution, 1, context))
    payload = watch.measure("dense encode, 3 bits", lambda: dense.encode(update, 0))
    watch.measure("dense decode", lambda: dense.decode(payload, count))
    data = watch.measure("sparse encode, density 0.1", lambda: sparse.encode(update))
    watch.measure("sparse decode, density 0.1", lambda: sparse.decode(data, count))
    first = np.zeros_like(update)
    held = watch.measure("downlink grid, 4 bits", lambda: on_grid(first, update, 4))
    change = watch.measure("downlink change", lambda: encode_change(first, held))
    watch.measure("downlink apply", lambda: apply(first, change))
    return watch.rows


def _encode_and_pack(codec: MaskableCodec, update: np.ndarray, context: RoundContext, width: int) -> RingUpdate:
    contribution = codec.encode(update, 1, context)
    pack(contribution.words, width)
    return contribution


if __name__ == "__main__":
    publish(
        __file__,
        "How fast is each step of the codecs on one core, and how much memory does it need?",
        ["coordinates", "step", "seconds", "M coordinates/s", "memory, vectors"],
        [row for count in SIZES for row in rows_for(count)],
    )
