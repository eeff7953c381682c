"""Reductions of client updates to one aggregate.

`fedavg`, `fedrot`, `alternating` and `ffa` are means of what travels; `flexlora` and `flora` average the products B·A.
`Robust` and `NormClipped` go around them.
"""

from fedtune.core.job.settings import FederationSettings
from fedtune.strategies.aggregation.aggregator import NOTHING, Accumulator, Aggregator, State
from fedtune.strategies.aggregation.linear import Alternating, FedAvg, FedRot, Frozen
from fedtune.strategies.aggregation.products import FlexLora, Flora
from fedtune.strategies.aggregation.robust import CoordinateMedian, MultiKrum, NormClipped, Robust, TrimmedMean

__all__ = [
    "NOTHING",
    "Accumulator",
    "Aggregator",
    "Alternating",
    "CoordinateMedian",
    "FedAvg",
    "FedRot",
    "FlexLora",
    "Flora",
    "Frozen",
    "MultiKrum",
    "NormClipped",
    "Robust",
    "State",
    "TrimmedMean",
    "aggregator_for",
    "aggregator_named",
]


def aggregator_named(name: str) -> Aggregator:
    """The aggregator that a job's `federation.aggregation` names."""
    match name:
        case "alternating":
            return Alternating()
        case "fedavg":
            return FedAvg()
        case "ffa":
            return Frozen()
        case "fedrot":
            return FedRot()
        case "flexlora":
            return FlexLora()
        case "flora":
            return Flora()
    raise ValueError(f"no aggregator is named {name!r}")


def aggregator_for(settings: FederationSettings) -> Aggregator:
    """A job's aggregator with its robust options around it: clipping outermost, so that rules see short updates."""
    aggregator = aggregator_named(settings.aggregation)
    match settings.robust:
        case "median":
            aggregator = Robust(aggregator, CoordinateMedian())
        case "trimmed-mean":
            aggregator = Robust(aggregator, TrimmedMean(settings.robust_share))
        case "multi-krum":
            aggregator = Robust(aggregator, MultiKrum(settings.robust_share))
    return aggregator if settings.clip_norm is None else NormClipped(aggregator, settings.clip_norm)
