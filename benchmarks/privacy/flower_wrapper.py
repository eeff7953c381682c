"""Flower's own wrapper for differential privacy, as the aggregator of a federation of fedtune's clients.

The wrapper clips each reply's change to a norm, lets FedAvg average the replies, and adds Gaussian noise to the mean.
Everything else is as in the other rows: the clients, their training, their cohorts and the clip of each round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedtune.core.adapter.layout import Vector
from fedtune.core.job.methods import AGGREGATIONS, Method
from fedtune.strategies.aggregation.aggregator import Aggregate, Frame, Update

KEY = "adapter"


@dataclass(frozen=True)
class FlowersPrivacy:
    """Averages clipped updates, and adds noise, by Flower's code.

    Args:
        rho: ρ of the noise in each round's mean.
        clip: the number of a round -> the norm to which updates are clipped.
    """

    rho: float
    clip: Callable[[int], float]
    method: Method = AGGREGATIONS["fedavg"]

    def begin(self, frame: Frame) -> _Replies:
        """Returns a round without replies."""
        return _Replies(self, frame)


@dataclass
class _Replies:
    aggregator: FlowersPrivacy
    frame: Frame
    updates: list[Vector] = field(default_factory=list)

    def add(self, update: Update) -> None:
        self.updates.append(update.values)

    def merge(self, other: _Replies) -> None:
        self.updates.extend(other.updates)

    def finish(self) -> Aggregate:
        """Hands all replies to the wrapper, and returns the change of what it gives back."""
        number, count = self.frame.terms[0].round, len(self.updates)
        wrapper = DifferentialPrivacyServerSideFixedClipping(
            FedAvg(), 1 / sqrt(2 * self.aggregator.rho), self.aggregator.clip(number), count
        )
        received = self.frame.adapter[self.frame.layout.segment(self.frame.factors)]
        wrapper.current_arrays = _record(received)
        arrays, _ = wrapper.aggregate_train(number, [_reply(received + update) for update in self.updates])
        assert arrays is not None, "the wrapper refused the replies"
        return Aggregate(arrays.to_numpy_ndarrays()[0].astype(np.float32) - received)


def _record(values: Vector) -> ArrayRecord:
    return ArrayRecord({KEY: Array(values)})


def _reply(values: Vector) -> Message:
    asked = Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=1, message_type="train")
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": _record(values), "metrics": metrics}), reply_to=asked)
