"""Aggregation: combines client updates into one aggregate, by parts that nest.

`aggregator` defines the interfaces; `payload_sums` has the outermost aggregators, which take payloads, and `grouped`
the one that takes a round's secure sums; `mean`, `products` and `robust` have the inner ones.
"""

from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.job.settings import FederationSettings
from fedtune.strategies.aggregation.aggregator import NOTHING, Aggregate, Aggregation, Aggregator, Frame, State, Update
from fedtune.strategies.aggregation.group_testing import GroupTesting
from fedtune.strategies.aggregation.grouped import Grouped, GroupSum
from fedtune.strategies.aggregation.mean import Mean
from fedtune.strategies.aggregation.payload_sums import Decoded, RingMean, Unpacked
from fedtune.strategies.aggregation.products import ProductMean
from fedtune.strategies.aggregation.robust import Clipped, CoordinateMedian, MultiKrum, Robust, TrimmedMean

__all__ = [
    "NOTHING",
    "Aggregate",
    "Aggregation",
    "Aggregator",
    "Clipped",
    "CoordinateMedian",
    "Decoded",
    "Frame",
    "GroupSum",
    "GroupTesting",
    "Grouped",
    "Mean",
    "MultiKrum",
    "ProductMean",
    "RingMean",
    "Robust",
    "State",
    "TrimmedMean",
    "Unpacked",
    "Update",
    "update_aggregator",
]


def update_aggregator(settings: FederationSettings) -> Aggregator[Update]:
    """Returns a job's aggregator of updates; clipping is outermost, so that robust rules see clipped updates."""
    declared = AGGREGATIONS[settings.aggregation]
    aggregator: Aggregator[Update] = ProductMean(declared) if declared.changes_basis else Mean(declared)
    match settings.robust:
        case "median":
            aggregator = Robust(declared, CoordinateMedian())
        case "trimmed-mean":
            aggregator = Robust(declared, TrimmedMean(settings.robust_share))
        case "multi-krum":
            aggregator = Robust(declared, MultiKrum(settings.robust_share))
        case "group-testing":
            aggregator = GroupTesting(aggregator, settings.robust_share)
    return aggregator if settings.clip_norm is None else Clipped(aggregator, settings.clip_norm)
