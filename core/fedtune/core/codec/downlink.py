"""The downlink codec: the adapter as all devices hold it, and the changes that lead to it from any version.

The server keeps `target`, the adapter that it computed. Devices hold `held`, which differs from the job's first adapter
by whole numbers of steps:

    held = first + δ·round((target - first) / δ)        # rounded(...), a function of the target alone

δ is a power of two near 6σ/(2^b - 1), σ the root mean square of target - first. So the step grows as the adapter moves
away from the first one, and a new device never fetches more than about log2(σ/δ) + 2 bits a value, however long the job
has run: 3.4 bits at b = 4. `held` never strays from the target by more than half a step, and the next `held` follows
from the next target, so no error adds up.

    payload = encode_change(old, held)                  # on the server, for devices that hold the version `old`
    held = apply(old, payload)                          # on a device: the same bits, from any version

`apply` is one product and one sum per coordinate, each a single IEEE operation: x86 and ARM agree. As all versions lie
on binary grids, the difference of any two is a vector of whole numbers of a step, and is encoded without loss. After
most rounds most values stay on their grid point, so a device that takes part in every round receives about a bit a
value.
"""

from __future__ import annotations

from math import frexp, ldexp, sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.adapter.layout import AdapterLayout, Vector, adapter_digest
from fedtune.core.codec.clipping import check_update
from fedtune.core.codec.entropy import encode_levels
from fedtune.core.codec.exact import ExactCodec, exact_size, exact_values
from fedtune.core.codec.quantization import MAX_LEVEL, MIN_STEP, levels_to_values, nearest_levels, relative_step
from fedtune.core.codec.sparse import decode_values, encode_step, max_levels_size
from fedtune.core.codec.wire import Kind, frame, unframe
from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import Downlink

FIRST = ""  # the job's first adapter, which all devices derive from the seed
REMEMBERED_VERSIONS = 8  # a device that is further behind starts again from the job's first adapter
GRID_BITS = 20  # a step is at least 2^-20 of the largest value, so that sums on the grid are exact in float32

_KINDS = frozenset({Kind.DELTA, Kind.EXACT})


def rounded(layout: AdapterLayout, first: Vector, target: Vector, bits: int | None) -> Vector:
    """Returns the adapter that devices shall hold, close to the target.

    Args:
        first: the job's first adapter; float32, (size,).
        target: the adapter that they should hold; float32, (size,).
        bits: resolution of the change since the first adapter, 2 to 8; None returns the target itself.

    Raises:
        UpdateError: the change holds NaN, infinity or an absurd magnitude.
    """
    if bits is None:
        return target.copy()
    parts = zip(layout.parts(first), layout.parts(target), strict=True)
    return np.concatenate([on_grid(before, wanted, bits) for before, wanted in parts])


def receive(layout: AdapterLayout, basis: Vector, adapter: Downlink) -> Vector:
    """Applies a downlink to the `basis` that a device holds; returns the adapter, float32, (size,).

    Raises:
        PeerError: a payload is malformed, or the result does not have the stated digest.
    """
    segments = layout.parts(basis)
    if len(adapter.parts) != len(segments):
        raise PeerError(f"an adapter of {len(adapter.parts)} payloads; this job's has {len(segments)} factors")
    held = np.concatenate([apply(old, part) for old, part in zip(segments, adapter.parts, strict=True)])
    if adapter_digest(held) != adapter.digest:
        raise PeerError("the adapter that arrived is not the one that the request was made for (its digest differs)")
    return held


def on_grid(first: NDArray[np.float32], target: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Returns `first` plus the whole number of steps nearest to `target`; float32, the shape of both.

    Raises:
        UpdateError: the change holds NaN, infinity or an absurd magnitude.
    """
    change = _difference(target, first)
    finest = ldexp(max(_largest(first), _largest(target)), -GRID_BITS)
    step = np.float32(_step(change, bits, finest))
    values = levels_to_values(nearest_levels(change, step), step)
    values += first
    return values


def encode_change(old: NDArray[np.float32], held: NDArray[np.float32]) -> bytes:
    """Encodes the change that takes a device from the version `old` to `held`, bit for bit.

    A difference that is not on a grid is sent as float32.

    Raises:
        UpdateError: either holds NaN, infinity or an absurd magnitude.
    """
    change = _difference(held, old)
    check_update(change)
    step = _grid(change)
    if _largest(change) <= step * MAX_LEVEL:
        data = _encode(change, step)
        if np.array_equal(apply(old, data).view(np.uint32), held.view(np.uint32)):
            return data
    return ExactCodec().encode(held)


def apply(held: NDArray[np.float32], data: bytes | memoryview) -> NDArray[np.float32]:
    """Applies a payload to `held`; returns held + δ·levels, or float32 values, all of them finite.

    Raises:
        PeerError: the payload is not well-formed or leads to values that are not finite.
    """
    kind, body = unframe(data, _KINDS, held.size, max_body_size(held.size))
    if kind == Kind.EXACT:
        return exact_values(body, held.size)
    values = decode_values(body, held.size)
    with np.errstate(over="ignore"):  # refused below, with a reason
        values += held
    if not np.isfinite(values).all():
        raise PeerError("payload: it leads to NaN or infinity")
    return values


def max_body_size(count: int) -> int:
    """Returns the most bytes that a body of any kind has."""
    return max(exact_size(count), max_levels_size(count))


def _encode(change: NDArray[np.float32], step: float) -> bytes:
    short = np.float32(step)
    return frame(Kind.DELTA, change.size, encode_step(short) + encode_levels(nearest_levels(change, short)))


def _difference(new: NDArray[np.float32], old: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # refused with a reason by the check of every update
        return new - old


def _largest(values: NDArray[np.float32]) -> float:
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))


def _step(change: NDArray[np.float32], bits: int, finest: float) -> float:
    """Returns the power of two nearest, by ratio, to the larger of the change's `relative_step` and `finest`."""
    deviation = check_update(change) / sqrt(max(change.size, 1))
    _, exponent = frexp(sqrt(2) * max(float(relative_step(deviation, bits)), finest))
    return ldexp(1.0, exponent - 1)


def _grid(values: NDArray[np.float32]) -> float:
    """Returns the largest power of two, at least MIN_STEP, of which all values are multiples."""
    present = values[values != 0]
    if not present.size:
        return MIN_STEP
    mantissas, exponents = np.frexp(present)
    digits = np.ldexp(mantissas, 24).astype(np.int32)
    lowest = np.frexp((digits & -digits).astype(np.float32))[1] - 1
    return max(ldexp(1.0, int((exponents - 24 + lowest).min())), MIN_STEP)
