"""Shamir's secret sharing over GF(p), p = 2^255 − 19 [Shamir 1979], with correction of wrong shares [Gao 2003].

    shares = split(secret, threshold, points, random)          # shares[i] belongs to points[i]
    secret = Combiner(points[:threshold]).combine(shares[:threshold])

A secret and a share are field elements, carried as 32 big-endian bytes. A point is a client index plus one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedtune.core.secagg.primitives import Random

PRIME = 2**255 - 19
ELEMENT_BYTES = 32

_WIDE_BYTES = 48  # 384 random bits reduced mod p are within 2^-129 of uniform


def random_element(random: Random) -> int:
    """Returns a field element, uniform up to a statistical distance of 2^-129."""
    return int.from_bytes(random(_WIDE_BYTES), "big") % PRIME


def to_bytes(element: int) -> bytes:
    return element.to_bytes(ELEMENT_BYTES, "big")


def to_element(data: bytes) -> int:
    """Reads a field element.

    Raises:
        ValueError: the data is not 32 bytes long, or its number is not below p.
    """
    element = int.from_bytes(data, "big")
    if len(data) != ELEMENT_BYTES or element >= PRIME:
        raise ValueError("not an element of the field")
    return element


def split(secret: int, threshold: int, points: Sequence[int], random: Random) -> list[int]:
    """Returns f(x) for x in points, where f(X) = secret + Σ_{m=1}^{t−1} a_m·X^m with random a_m.

    Any t shares determine the secret; t − 1 of them reveal nothing about it.

    Args:
        secret: an element of the field.
        threshold: t, 1 or more.
        points: distinct, none of them 0 modulo p.

    Raises:
        ValueError: a point is repeated, or is 0, whose share would be the secret itself.
    """
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError("points of shares must be distinct and not zero")
    coefficients = [random_element(random) for _ in range(threshold - 1)]
    coefficients.reverse()
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * point % PRIME
        shares.append((value + secret) % PRIME)
    return shares


class Combiner:
    """Recovers secrets whose shares belong to the same points; the Lagrange weights are computed once.

    λ_i = Π_{j≠i} x_j / (x_j − x_i),   secret = f(0) = Σ_i λ_i·y_i  (mod p)
    """

    def __init__(self, points: Sequence[int]) -> None:
        self.points = tuple(points)
        product = 1
        for point in self.points:
            product = product * point % PRIME
        self._weights = []
        for point in self.points:
            denominator = point
            for other in self.points:
                if other != point:
                    denominator = denominator * (other - point) % PRIME
            self._weights.append(product * pow(denominator, -1, PRIME) % PRIME)

    def combine(self, shares: Sequence[int]) -> int:
        """Recovers the secret from shares[i] at points[i], with as many shares as points."""
        return sum(weight * share for weight, share in zip(self._weights, shares, strict=True)) % PRIME


class Corrected(NamedTuple):
    """A secret, and the points whose shares do not lie on its polynomial."""

    secret: int
    wrong: tuple[int, ...]


def correct(points: Sequence[int], shares: Sequence[int], threshold: int) -> Corrected | None:
    """Recovers the secret in spite of up to (m − t) // 2 wrong shares among m; None when no polynomial is near enough.

    Gao's decoder: with g_0 = Π(X − x_i) and g_1 the interpolation of all shares, the extended Euclidean algorithm on
    (g_0, g_1), stopped at the first remainder r of degree below (m + t)/2, has r = v·f for the error locator v.
    """
    zeros, received = [1], [0]
    for point, share in zip(points, shares, strict=True):  # Newton: received meets every share up to here
        step = (share - _evaluate(received, point)) * pow(_evaluate(zeros, point), -1, PRIME) % PRIME
        received = _subtract(received, _multiply(zeros, [-step]))
        zeros = _multiply(zeros, [-point, 1])
    before, remainder = zeros, received
    v_before, v = [0], [1]
    while 2 * (len(remainder) - 1) >= len(points) + threshold:
        quotient, rest = _divide(before, remainder)
        before, remainder = remainder, rest
        v_before, v = v, _subtract(v_before, _multiply(quotient, v))
    message, rest = _divide(remainder, v)
    if any(rest) or len(message) > threshold:
        return None
    received_at = zip(points, shares, strict=True)
    return Corrected(message[0], tuple(point for point, share in received_at if _evaluate(message, point) != share))


_Polynomial = list[int]  # coefficients, constant first, the last one not zero unless it is the only one


def _evaluate(polynomial: _Polynomial, point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _trimmed(polynomial: _Polynomial) -> _Polynomial:
    while len(polynomial) > 1 and polynomial[-1] == 0:
        polynomial.pop()
    return polynomial


def _subtract(left: _Polynomial, right: _Polynomial) -> _Polynomial:
    size = max(len(left), len(right))
    padded = zip(left + [0] * (size - len(left)), right + [0] * (size - len(right)), strict=True)
    return _trimmed([(a - b) % PRIME for a, b in padded])


def _multiply(left: _Polynomial, right: _Polynomial) -> _Polynomial:
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] = (product[i + j] + a * b) % PRIME
    return _trimmed(product)


def _divide(dividend: _Polynomial, divisor: _Polynomial) -> tuple[_Polynomial, _Polynomial]:
    rest = list(dividend)
    inverse = pow(divisor[-1], -1, PRIME)
    quotient = [0] * max(1, len(dividend) - len(divisor) + 1)
    for shift in range(len(dividend) - len(divisor), -1, -1):
        factor = rest[shift + len(divisor) - 1] * inverse % PRIME
        quotient[shift] = factor
        for index, coefficient in enumerate(divisor):
            rest[shift + index] = (rest[shift + index] - factor * coefficient) % PRIME
    return _trimmed(quotient), _trimmed(rest[: max(1, len(divisor) - 1)])
