"""Group testing: the groups' means are tested against each other, and evidence is kept over rounds about their clients.

    Grouped(RingMean(method), GroupTesting(Mean(method), share=0.2))

A round's scores are the groups' coordinates along the first principal component of their means. Honest updates differ
in all directions alike, so that the variances along the components are similar; clients that push one way give one
component a much larger variance, so that their round weighs more in the evidence. What the evidence of all rounds says
against clients (`evidence`) decides which groups are left out of the mean: those with a client that is doubted, or,
where the first component's variance is more than `APART` times that of the middle one, as many as are expected to have
a hostile client. Honest groups seldom reach that: a rule that left groups out for what some honest clients have in
common would leave out what only they know.

Group testing under secure aggregation is FedGT's (Xhemrishi et al. 2023), which tests by a validation set that the
server holds; the first component as the sign of poison is DnC's (Shejwalkar and Houmansadr 2021).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtune.core.job.methods import RULE, Method
from fedtune.strategies.aggregation.aggregator import Aggregate, Aggregator, Frame, Update
from fedtune.strategies.aggregation.evidence import Evidence, GroupTest
from fedtune.strategies.aggregation.mean import ExactSum
from fedtune.strategies.aggregation.robust import Stack, compared

APART = 3.0  # of the demo's honest groups it is 1.5 in the first round, and 2.1 to 2.7 in the fifth


@dataclass(frozen=True)
class GroupTesting:
    """Leaves out the groups against which the evidence speaks.

    Args:
        inner: combines the groups that stay.
        share: share of the clients that may be hostile.
    """

    inner: Aggregator[Update]
    share: float

    @property
    def method(self) -> Method:
        """The inner aggregator's method, with the needs of a rule."""
        return self.inner.method.within(RULE)

    def begin(self, frame: Frame) -> TestedGroups:
        """Returns an aggregation without groups."""
        return TestedGroups(self, frame)


class TestedGroups:
    """The groups of a round, collected until they can be tested."""

    def __init__(self, aggregator: GroupTesting, frame: Frame) -> None:
        self._aggregator, self._frame = aggregator, frame
        self._check = ExactSum(frame.size)  # refuses exactly the updates that a sum refuses
        self._groups: list[Update] = []

    def add(self, update: Update) -> None:
        """Keeps one group's mean.

        Raises:
            UpdateError: no sum could take it.
        """
        self._check.add(update.values, update.weight)
        self._groups.append(replace(update, values=update.values.copy()))

    def merge(self, other: TestedGroups) -> None:
        """Adds the other's groups."""
        self._check.merge(other._check)
        self._groups += other._groups

    def finish(self) -> Aggregate:
        """Returns the inner aggregate of the groups that stay, and the evidence."""
        groups = sorted(self._groups, key=lambda group: group.clients)  # in any order of arrival
        evidence = self._frame.evidence
        if len(groups) > 1:
            scores = scored(np.stack([group.values[compared(self._frame)] for group in groups]))
            test = GroupTest(tuple(group.clients for group in groups), scores)
            evidence = evidence.after(test, self._aggregator.share)
            groups = self._staying(groups, evidence)
        inner = self._aggregator.inner.begin(self._frame)
        for group in groups:
            inner.add(group)
        return replace(inner.finish(), evidence=evidence)

    def _staying(self, groups: list[Update], evidence: Evidence) -> list[Update]:
        """Returns the groups without doubted clients, or as many of the nearest as are expected to be honest.

        Of the hostile share, those condemned before this round are not among its clients.
        """
        if sum(score**2 for score in evidence.tests[-1].scores) <= APART:
            return [group for group in groups if not set(evidence.doubted) & set(group.clients)] or groups
        clients = sum(len(group.clients) for group in groups)
        hidden = int(self._aggregator.share * len(evidence.distance)) - len(self._frame.evidence.condemned)
        honest = 1 - max(0, hidden) / clients
        count = max(1, round(sum(honest ** len(group.clients) for group in groups)))

        def distance(group: Update) -> float:
            return float(np.mean([evidence.distance[name] for name in group.clients]))

        return sorted(groups, key=distance)[:count]


def scored(means: Stack) -> tuple[float, ...]:
    """Returns the groups' coordinates along their first principal component.

    They are in units of the noise of one group's mean, which the middle component's variance gives: the sum of their
    squares is how many times that the first component's variance is.
    """
    deviations = means.astype(np.float64)
    deviations -= deviations.mean(axis=0)
    variances, components = np.linalg.eigh(deviations @ deviations.T)
    usual = float(np.median(variances[1:]))  # the smallest is 0: deviations from a mean have one dimension less
    if usual <= 0:
        return (0.0,) * len(means)
    return tuple((components[:, -1] * np.sqrt(variances[-1] / usual)).tolist())
