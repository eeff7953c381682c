"""Evidence against clients, from sums over groups, which are other ones in every round: group testing.

    evidence = evidence.after(GroupTest(groups, scores), share)
    evidence.distance["phone-7"]        # how far it stands from the middle of all clients
    evidence.doubted                    # their groups are left out of the mean
    evidence.condemned                  # left out of cohorts as long as the evidence says so

The scores of a round say where its groups' means lie along the direction in which they differ most. If a few clients
push one way, a group's score grows with how many of them are in it, so each round weighs every client once, in the
company of others each time. The scores s of test t are taken for the means over its groups g of values x of clients,
times a factor of the test, and both are fitted in turn, by least squares:

    s_tg ≈ f_t·(mean of x over g - mean of that over all groups of t),    + λ·Σ x²,    mean of f² = 1

A direction has no sign, nor has the solution. Which side is hostile follows from hostile clients being few: it is the
side to which the clients' values are skewed. A client's distance is that from the median, on that side, in
robust standard deviations. Nothing is final: the values are fitted again after each test, to all tests together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.decomposition import svd

RIDGE = 0.05  # λ, against 1/k of a client's share in each of its groups' means
DOUBTING, CONDEMNING = 2.0, 3.5  # distance above which a client is doubted, and condemned
FEWEST_TESTS = 3  # of a client, before it can be either
KEPT_TESTS = 64
_DEVIATION = 1.4826  # standard deviation of a normal distribution, over its median absolute deviation
_FITS = 10  # fits of values and factors in turn
_STEPS = 100  # most steps of a fit

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupTest:
    """The test of one round's groups.

    Args:
        groups: the clients in each group's sum.
        scores: each group's; 0 is the middle.
    """

    groups: tuple[tuple[str, ...], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Evidence:
    """The tests so far, and their verdict.

    Args:
        tests: the last ones.
        distance: client -> that from the median client, in robust standard deviations, above 0 on the hostile side.
        doubted: the farthest first; at most a share of the tested clients.
        condemned: those of them who are farther yet.
    """

    tests: tuple[GroupTest, ...] = ()
    distance: Mapping[str, float] = field(default_factory=dict)
    doubted: tuple[str, ...] = ()
    condemned: tuple[str, ...] = ()

    def after(self, test: GroupTest, share: float) -> Evidence:
        """Returns the evidence after one more test.

        Args:
            share: share of the clients that may be hostile, and so be doubted or condemned.
        """
        tests = (*self.tests, test)[-KEPT_TESTS:]
        distance = distances(tests)
        tested = Counter(name for each in tests for group in each.groups for name in group)
        against = [name for name, value in distance.items() if value > DOUBTING and tested[name] >= FEWEST_TESTS]
        most = int(share * len(distance))
        doubted = tuple(sorted(against, key=lambda name: -distance[name])[:most])
        return Evidence(tests, distance, doubted, tuple(name for name in doubted if distance[name] > CONDEMNING))

    def notes(self, before: Evidence) -> tuple[str, ...]:
        """Returns one sentence about each client that is condemned now and was not before, or the other way round."""
        why = "the groups that it was in stand apart from the others"
        condemned = [f"{name} is left out: {why}" for name in self.condemned if name not in before.condemned]
        freed = [name for name in before.condemned if name not in self.condemned]
        return (*condemned, *(f"{name} may take part again: the rounds since speak for it" for name in freed))

    def to_json(self) -> dict[str, Any]:
        """Returns the object in a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evidence:
        """Reads the object that `to_json` wrote."""
        tests = (GroupTest(tuple(map(tuple, each["groups"])), tuple(each["scores"])) for each in values["tests"])
        return cls(tuple(tests), dict(values["distance"]), tuple(values["doubted"]), tuple(values["condemned"]))


NO_EVIDENCE = Evidence()


def distances(tests: Sequence[GroupTest]) -> dict[str, float]:
    """Returns the distance of every client that was tested."""
    names = sorted({name for test in tests for group in test.groups for name in group})
    values = _fitted(_Memberships.of(tests, names), np.array([score for test in tests for score in test.scores]))
    if np.sum((values - np.mean(values)) ** 3) < 0:
        values = -values
    values -= np.median(values)
    deviation = _DEVIATION * float(np.median(np.abs(values)))
    return dict(zip(names, (values / max(deviation, 1e-9)).tolist(), strict=True))


@dataclass(frozen=True)
class _Memberships:
    """The linear map from clients' values to groups' scores: means over groups, less the mean of the test's groups.

    Args:
        group: each membership's group; groups count through all tests.
        client: each membership's client.
        part: each membership's part in the group's mean.
        test: each group's test.
    """

    group: npt.NDArray[np.intp]
    client: npt.NDArray[np.intp]
    part: Values
    test: npt.NDArray[np.intp]
    clients: int

    @classmethod
    def of(cls, tests: Sequence[GroupTest], names: Sequence[str]) -> _Memberships:
        """Returns the map of these tests."""
        index = {name: place for place, name in enumerate(names)}
        groups = [group for test in tests for group in test.groups]
        sizes = np.array([len(group) for group in groups])
        return cls(
            np.repeat(np.arange(len(groups)), sizes),
            np.array([index[name] for group in groups for name in group]),
            np.repeat(1 / sizes, sizes),
            np.repeat(np.arange(len(tests)), [len(test.groups) for test in tests]),
            len(names),
        )

    def scores(self, values: Values) -> Values:
        """Returns the scores that these clients' values give."""
        means: Values = np.bincount(self.group, values[self.client] * self.part, len(self.test)).astype(np.float64)
        return self._centred(means)

    def spread(self, scores: Values) -> Values:
        """Returns the transposed map: each client's sum of its parts in the scores."""
        parts = self._centred(scores)[self.group] * self.part
        return np.bincount(self.client, parts, self.clients).astype(np.float64)

    def _centred(self, scores: Values) -> Values:
        centred: Values = scores - (np.bincount(self.test, scores) / np.bincount(self.test))[self.test]
        return centred


def _fitted(memberships: _Memberships, scores: Values) -> Values:
    """Returns the clients' values, fitted in turn with the factors of the tests.

    The first factors are those that align the tests' scores, spread over their clients, along one direction.
    """
    test, count = memberships.test, int(memberships.test[-1]) + 1
    spread = [memberships.spread(np.where(test == place, scores, 0.0)) for place in range(count)]
    factors = svd(np.array(spread), full_matrices=False)[0][:, 0]
    for _ in range(_FITS):
        if not (norm := float(np.linalg.norm(factors))):
            break  # no score differs from another
        factors *= np.sqrt(count) / norm
        values = _ridge(memberships, factors[test], scores)
        fitted = memberships.scores(values)
        square = np.bincount(test, fitted**2)
        factors = np.divide(np.bincount(test, fitted * scores), square, out=np.zeros(count), where=square > 0)
    return values


def _ridge(memberships: _Memberships, factors: Values, scores: Values) -> Values:
    """Solves (MᵀF²M + λ)·x = MᵀF·s by conjugate gradients."""
    rest = memberships.spread(factors * scores)
    values, direction, square = np.zeros_like(rest), rest.copy(), float(rest @ rest)
    least = 1e-20 * square
    for _ in range(_STEPS):
        if square <= least:
            break
        image = memberships.spread(factors**2 * memberships.scores(direction)) + RIDGE * direction
        step = square / float(direction @ image)
        values += step * direction
        rest -= step * image
        before, square = square, float(rest @ rest)
        direction = rest + square / before * direction
    return values
