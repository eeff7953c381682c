"""How the adapter travels down: what both sides do to the version that devices hold.

held = advance(layout, held, target, factors, bits)        # on the server, after a round
held = receive(layout, basis, request.adapter)             # on a device: the same bits, from whichever version
"""

from __future__ import annotations

import numpy as np

from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector, adapter_digest, factor_letters
from fedtune.core.codec import apply, encode_delta, encode_refresh
from fedtune.core.errors import PeerError
from fedtune.core.protocol.payloads import Downlink

FIRST = ""  # the basis that everybody knows from the job's seed
REMEMBERED_VERSIONS = 8  # a device that is further behind starts again from the job's first adapter


def advance(layout: AdapterLayout, held: Vector, target: Vector, factors: Factors, bits: int | None) -> Vector:
    """The adapter that devices shall hold after a round.

    Args:
        held: what they hold now; float32, (size,).
        target: what they should hold; float32, (size,).
        factors: which factors the round changed; the others wait for their turn.
        bits: how fine the change is sent; None sends the target itself, as float32.
    """
    if bits is None:
        return target.copy()
    after = held.copy()
    for factor in factor_letters(factors):
        segment = layout.segment(factor)
        after[segment] = apply(held[segment], encode_delta(held[segment], target[segment], bits))
    return after


def refreshed(layout: AdapterLayout, target: Vector, bits: int | None) -> Vector:
    """The adapter that devices shall hold after a change of basis: all of the target, at 8 bits.

    Args:
        bits: as `advance`; None for the target itself.
    """
    if bits is None:
        return target.copy()
    return np.concatenate([apply(half, encode_refresh(half)) for half in layout.halves(target)])


def receive(layout: AdapterLayout, basis: Vector, adapter: Downlink) -> Vector:
    """The adapter on a device: the basis, changed by what arrived; float32, (size,).

    Raises:
        PeerError: a payload is malformed, or the result is not the adapter that was meant.
    """
    halves = zip(layout.halves(basis), adapter.parts, strict=True)
    held = np.concatenate([apply(half, part) for half, part in halves])
    if adapter_digest(held) != adapter.digest:
        raise PeerError("the adapter that arrived is not the one that the request was made for (its digest differs)")
    return held
