"""Reductions of client updates to one aggregate: `fedavg`, and `alternating`, which trains one factor a round."""

from fedtune.strategies.aggregators.base import Accumulator, Aggregator
from fedtune.strategies.aggregators.linear import Alternating, FedAvg

__all__ = ["Accumulator", "Aggregator", "Alternating", "FedAvg", "aggregator_named"]


def aggregator_named(name: str) -> Aggregator:
    """The aggregator that a job's `federation.aggregation` names."""
    match name:
        case "alternating":
            return Alternating()
        case "fedavg":
            return FedAvg()
    raise ValueError(f"no aggregator is named {name!r}")
