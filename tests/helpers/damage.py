"""Damage to bytes and to values: what a decoder must refuse with its own error, or take whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NASTY: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 63, -(1 << 63), 10**400, float("nan"), float("inf"), -float("inf"), 0.5),
    *("", "x", "\ud800", "\0", "../x", " ab", "0" * 5000, [], {}, [[]], [{}], {"": 0}, ["x", "x"], [10**400]),
)
"""Values that a decoder may not expect: of every type of JSON, and at the edges of each."""


@st.composite
def damaged(draw: st.DrawFn, message: bytes) -> bytes:
    """Draws a message with some bytes replaced, removed, doubled or inserted."""
    spoilt = bytearray(message)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(spoilt) - 1)))
        stop = min(len(spoilt), start + draw(st.sampled_from([1, 1, 2, 16, 80])))
        piece: Any = draw(st.sampled_from(["flip", "cut", "double", "insert"]))
        if piece == "flip" and spoilt:
            spoilt[start] ^= draw(st.integers(1, 255))
        elif piece == "cut":
            del spoilt[start:stop]
        elif piece == "double":
            spoilt[start:start] = spoilt[start:stop]
        else:
            spoilt[start:start] = draw(st.binary(min_size=1, max_size=8))
    return bytes(spoilt)


def changed(value: Any) -> Iterator[Any]:
    """Yields a value of lists and dictionaries with each of its parts, at any depth, replaced, removed and added to."""
    yield from NASTY
    for path in _paths(value):
        for nasty in NASTY:
            yield _at(value, path, lambda place, key, nasty=nasty: place.__setitem__(key, nasty))
        yield _at(value, path, lambda place, key: place.__delitem__(key))
        yield _at(
            value, path, lambda place, key: place.insert(key, 0) if isinstance(place, list) else place.update(x=0)
        )


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*before, key)
            yield from _paths(value[key], (*before, key))


def _at(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    whole = copy.deepcopy(value)
    place = whole
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return whole
