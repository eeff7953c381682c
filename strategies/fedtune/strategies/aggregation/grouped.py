"""The aggregation of several sums of a round, each over a group of clients.

    Grouped(RingMean(method), Mean(method))                             # the mean over all clients
    Grouped(RingMean(method), Robust(method, CoordinateMedian()))       # a rule over the groups' means
    Grouped(RingMean(method), GroupTesting(Mean(method), share))        # one that remembers their clients

A rule over the means of groups sees no single update. A hostile client moves the mean of its own group, and the rule
does with that mean what it does with a hostile update in the clear. If a share p of the clients is hostile, a share of
1 - (1 - p)^k of groups of k clients is expected to have one, and the rule must stand that share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtune.core.job.methods import Method
from fedtune.strategies.aggregation.aggregator import Aggregate, Aggregator, Clips, Frame, Update
from fedtune.strategies.aggregation.payload_sums import Totals


@dataclass(frozen=True)
class GroupSum:
    """The sum over one group.

    Args:
        clients: those whose updates are in it.
    """

    clients: tuple[str, ...]
    totals: Totals


@dataclass(frozen=True)
class Grouped:
    """Averages within groups, and combines the groups' means.

    Args:
        within: takes the sum over one group.
        across: takes a group's mean as if it were one client's update, with the group's clients as its weight.
    """

    within: Aggregator[Totals]
    across: Aggregator[Update]

    @property
    def method(self) -> Method:
        """The method across groups, which sees their means and no single update."""
        return replace(self.across.method, sees_updates=self.within.method.sees_updates)

    def begin(self, frame: Frame) -> GroupMeans:
        """Returns an aggregation without groups."""
        return GroupMeans(self, frame)


class GroupMeans:
    """The means of a round's groups."""

    def __init__(self, aggregator: Grouped, frame: Frame) -> None:
        self._aggregator, self._frame = aggregator, frame
        self._means: list[tuple[Aggregate, tuple[str, ...]]] = []

    def add(self, group: GroupSum) -> None:
        """Takes the sum over one group.

        Raises:
            PeerError, RunError: it is no sum of that many contributions; the aggregation is unchanged.
        """
        within = self._aggregator.within.begin(self._frame)
        within.add(group.totals)
        self._means.append((within.finish(), group.clients))

    def merge(self, other: GroupMeans) -> None:
        """Adds the other's groups."""
        self._means += other._means

    def finish(self) -> Aggregate:
        """Returns the aggregate; a single group's is its own mean. A clip is the median of the groups' clips."""
        if not self._means:
            return self._aggregator.within.begin(self._frame).finish()
        if len(self._means) == 1:
            return self._means[0][0]
        across = self._aggregator.across.begin(self._frame)
        for mean, clients in self._means:
            across.add(Update(mean.update, len(clients), clients=clients))
        aggregate = across.finish()
        factors = self._means[0][0].clips
        clips: Clips = {factor: float(np.median([mean.clips[factor] for mean, _ in self._means])) for factor in factors}
        return replace(aggregate, clips=clips)
