"""The downlink codec: changes of the adapter, after which every device holds the same bits.

The server keeps two vectors per factor: `target`, the adapter that it computed, and `held`, the adapter that the
devices hold. A *delta* carries their difference, coarsely. The server applies it to its own `held` as every device
does, so `target - held`, which has not been sent yet, is the server's residual and needs no state of its own.

    held = advance(layout, held, target, factors, bits)     # on the server, after a round
    held = receive(layout, basis, request.adapter)          # on a device: the same bits, from any version

For one factor:

    data = encode_delta(held, target, bits)
    held = apply(held, data)                                # on the server, and on every device

`apply` is one product and one sum per coordinate, each a single IEEE operation: x86 and ARM agree. Steps are powers
of two, so `held` stays on a binary grid, and the difference of any two versions is a vector of whole numbers. A
device that missed rounds or is new receives exactly that difference, a *catch-up*, and then holds the same adapter as
all others. A *refresh* replaces the whole adapter of all devices at 8 bits: after a change of basis, or to put a first
adapter on a grid.
"""

from __future__ import annotations

from math import frexp, ldexp, sqrt

import numpy as np
from numpy.typing import NDArray

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector, adapter_digest, factor_letters
from fedtune.core.codec.clipping import check_update
from fedtune.core.codec.entropy import encode_levels
from fedtune.core.codec.exact import ExactCodec, exact_size, exact_values
from fedtune.core.codec.quantization import MAX_LEVEL, MIN_STEP, nearest_levels, relative_step
from fedtune.core.codec.sparse import decode_values, encode_step, max_levels_size
from fedtune.core.codec.wire import Kind, frame, unframe
from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import Downlink

FIRST = ""  # the job's first adapter, which all devices derive from the seed
REMEMBERED_VERSIONS = 8  # a device that is further behind starts again from the job's first adapter
REFRESH_BITS = 8
GRID_BITS = 20  # a step is at least 2^-20 of the largest value, so that sums on the grid are exact in float32
# The rest that a delta leaves out is uniform over a step: at most √3 times its root mean square. At 2 bits a step is 2
# root mean squares. Up to √3 times that, the next delta still sends something; with coarser steps devices would never
# catch up.
STRETCH = 1.7

_KINDS = frozenset({Kind.DELTA, Kind.WHOLE, Kind.EXACT})


def advance(layout: AdapterLayout, held: Vector, target: Vector, factors: Factors, bits: int | None) -> Vector:
    """Returns the adapter that devices shall hold after a round.

    Args:
        held: the adapter that devices hold now; float32, (size,).
        target: the adapter that they should hold; float32, (size,).
        factors: the factors that the round changed; the others stay as they are.
        bits: resolution of the change; None sends the target itself, as float32.
    """
    if bits is None:
        return target.copy()
    after = held.copy()
    for factor in factor_letters(factors):
        segment = layout.segment(factor)
        after[segment] = apply(held[segment], encode_delta(held[segment], target[segment], bits))
    return after


def refreshed(layout: AdapterLayout, target: Vector, bits: int | None) -> Vector:
    """Returns the adapter that devices shall hold after a change of basis: all of the target, at 8 bits.

    Args:
        bits: as in `advance`; None returns the target itself.
    """
    if bits is None:
        return target.copy()
    return np.concatenate([apply(half, encode_refresh(half)) for half in layout.halves(target)])


def receive(layout: AdapterLayout, basis: Vector, adapter: Downlink) -> Vector:
    """Applies a downlink to the `basis` that a device holds; returns the adapter, float32, (size,).

    Raises:
        PeerError: a payload is malformed, or the result does not have the stated digest.
    """
    halves = zip(layout.halves(basis), adapter.parts, strict=True)
    held = np.concatenate([apply(half, part) for half, part in halves])
    if adapter_digest(held) != adapter.digest:
        raise PeerError("the adapter that arrived is not the one that the request was made for (its digest differs)")
    return held


def encode_delta(held: NDArray[np.float32], target: NDArray[np.float32], bits: int) -> bytes:
    """Encodes the change from `held` towards `target`, in steps near 6/(2^bits - 1) of its root mean square.

    Args:
        held: the values that devices hold; float32, shape (count,).
        target: the values that they should hold; float32, same shape.
        bits: 2 to 8.

    Raises:
        UpdateError: the difference holds NaN, infinity or an absurd magnitude.
    """
    change = _difference(target, held)
    finest = ldexp(max(_largest(held), _largest(target)), -GRID_BITS)
    return _encode(Kind.DELTA, change, _step(change, bits, finest))


def encode_refresh(target: NDArray[np.float32]) -> bytes:
    """Encodes all of `target` at 8 bits. It replaces the values on a device, so it must go to all devices.

    Raises:
        UpdateError: the target holds NaN, infinity or an absurd magnitude.
    """
    return _encode(Kind.WHOLE, target, _step(target, REFRESH_BITS, ldexp(_largest(target), -GRID_BITS)))


def encode_catch_up(old: NDArray[np.float32], held: NDArray[np.float32]) -> bytes:
    """Encodes the change that takes a device from the version `old` to `held`, bit for bit.

    For a new device `old` is zero. A difference that is not on a grid is sent as float32.

    Raises:
        UpdateError: either holds NaN, infinity or an absurd magnitude.
    """
    change = _difference(held, old)
    check_update(change)
    step = _grid(change)
    if _largest(change) <= step * MAX_LEVEL:
        data = _encode(Kind.DELTA, change, step)
        if np.array_equal(apply(old, data).view(np.uint32), held.view(np.uint32)):
            return data
    return ExactCodec().encode(held)


def encode_whole(held: NDArray[np.float32]) -> bytes | None:
    """Encodes all of `held`, bit for bit, for devices of any version; None where it does not lie on a grid.

    After a change of basis this takes fewer bytes than the change since an older version.

    Raises:
        UpdateError: `held` holds NaN, infinity or an absurd magnitude.
    """
    check_update(held)
    step = _grid(held)
    if _largest(held) > step * MAX_LEVEL:
        return None
    data = _encode(Kind.WHOLE, held, step)
    return data if np.array_equal(apply(held, data).view(np.uint32), held.view(np.uint32)) else None


def apply(held: NDArray[np.float32], data: bytes | memoryview) -> NDArray[np.float32]:
    """Applies a payload to `held`; returns held + δ·levels, or δ·levels, or float32 values, all of them finite.

    Raises:
        PeerError: the payload is not well-formed or leads to values that are not finite.
    """
    kind, body = unframe(data, _KINDS, held.size, max_body_size(held.size))
    if kind == Kind.EXACT:
        return exact_values(body, held.size)
    values = decode_values(body, held.size)
    if kind == Kind.DELTA:
        with np.errstate(over="ignore"):  # refused below, with a reason
            values += held
    if not np.isfinite(values).all():
        raise PeerError("payload: it leads to NaN or infinity")
    return values


def max_body_size(count: int) -> int:
    """Returns the most bytes that a body of any kind has."""
    return max(exact_size(count), max_levels_size(count))


def _encode(kind: Kind, values: NDArray[np.float32], step: float) -> bytes:
    short = np.float32(step)
    return frame(kind, values.size, encode_step(short) + encode_levels(nearest_levels(values, short)))


def _difference(new: NDArray[np.float32], old: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # refused with a reason by the check of every update
        return new - old


def _largest(values: NDArray[np.float32]) -> float:
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))


def _step(values: NDArray[np.float32], bits: int, finest: float) -> float:
    """Returns the largest power of two up to STRETCH times the larger of the values' `relative_step` and `finest`."""
    deviation = check_update(values) / sqrt(max(values.size, 1))
    _, exponent = frexp(STRETCH * max(float(relative_step(deviation, bits)), finest))
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
