"""Sharing and recovering secrets."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.secagg.shamir import PRIME, Combiner, correct, split, to_bytes, to_element

elements = st.integers(0, PRIME - 1)


@st.composite
def sharings(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Draws a secret, a threshold and at least that many points."""
    points = draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=12, unique=True))
    return draw(elements), draw(st.integers(1, len(points))), points


@settings(deadline=None)
@given(sharings(), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_recovers_the_secret(sharing: tuple[int, int, list[int]], order: object) -> None:
    secret, threshold, points = sharing
    pairs = list(zip(points, split(secret, threshold, points, os.urandom), strict=True))
    order.shuffle(pairs)  # type: ignore[attr-defined]
    chosen = pairs[:threshold]
    assert Combiner([point for point, _ in chosen]).combine([share for _, share in chosen]) == secret


@settings(deadline=None)
@given(elements, elements)
def test_fewer_shares_than_the_threshold_fit_every_secret(secret: int, other: int) -> None:
    shares = split(secret, 3, [1, 2, 3], os.urandom)[:2]
    third = _line_through([(0, other), (1, shares[0]), (2, shares[1])], at=3)
    assert Combiner([1, 2, 3]).combine([*shares, third]) == other


@settings(deadline=None)
@given(sharings(), st.data())
def test_wrong_shares_are_corrected_and_named_up_to_half_of_what_is_spare(
    sharing: tuple[int, int, list[int]], data: st.DataObject
) -> None:
    secret, threshold, points = sharing
    shares = split(secret, threshold, points, os.urandom)
    spoilt = data.draw(st.sets(st.sampled_from(range(len(points))), max_size=(len(points) - threshold) // 2))
    for index in spoilt:
        shares[index] = (shares[index] + data.draw(st.integers(1, PRIME - 1))) % PRIME
    found = correct(points, shares, threshold)
    assert found is not None
    assert found.secret == secret
    assert set(found.wrong) == {points[index] for index in spoilt}


def test_more_wrong_shares_than_can_be_corrected_do_not_pass_for_a_secret() -> None:
    shares = split(5, 3, [1, 2, 3, 4, 5], os.urandom)
    shares[0] += 1
    shares[1] += 1
    assert correct([1, 2, 3, 4, 5], shares, 3) is None


@pytest.mark.parametrize("points", [[0, 1], [1, 1], [PRIME, 1]])
def test_points_that_would_give_the_secret_away_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        split(1, 2, points, os.urandom)


@settings(deadline=None)
@given(elements)
def test_elements_survive_their_byte_form(element: int) -> None:
    assert to_element(to_bytes(element)) == element


@pytest.mark.parametrize("data", [b"", bytes(31), bytes(33), PRIME.to_bytes(32, "big"), b"\xff" * 32])
def test_bytes_that_are_no_element_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an element"):
        to_element(data)


def _line_through(points: list[tuple[int, int]], at: int) -> int:
    """Evaluates the lowest polynomial through the points at `at`, by Lagrange's formula."""
    total = 0
    for x, y in points:
        weight = 1
        for other, _ in points:
            if other != x:
                weight = weight * (at - other) * pow(x - other, -1, PRIME) % PRIME
        total += weight * y
    return total % PRIME
