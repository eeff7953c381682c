"""The table of methods: each declares here, once, its needs and effects, for devices, server and the checks of a job.

    method = method_of(job.federation)
    if job.hides_updates and not method.works_under_masks: ...

Aggregations and the rules around them are declared separately; `Method.within` composes the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.core.adapter.layout import Factors

if TYPE_CHECKING:
    from fedtune.core.job.settings import FederationSettings


@dataclass(frozen=True)
class Method:
    """The needs and effects of a way to combine updates.

    Args:
        trains: factors that rounds train, one entry per round, repeated over the rounds; none where every round trains
            all factors, whatever the kind of adapter.
        aligns: whether devices align their factors to the received ones before they send them.
        sees_updates: reason why a sum of updates is not enough, as the end of "..., which ..."; "" where it is enough.
        equal_ranks: reason why all clients must train the same rank, in the same form; "" where they need not.
        changes_basis: whether every round writes both factors in another basis, which invalidates residuals, coarse
            changes and moments of a server optimizer.
        keeps_residual: whether the server keeps a part of the result that no adapter of the job's rank can hold.
    """

    trains: tuple[Factors, ...] = ()
    aligns: bool = False
    sees_updates: str = ""
    equal_ranks: str = ""
    changes_basis: bool = False
    keeps_residual: bool = False

    def factors(self, round_number: int, every: Factors = "ab") -> Factors:
        """Returns the factors that clients train and send in a round.

        Args:
            round_number: number of the round, counted from 1.
            every: all factors of the adapter.
        """
        return self.trains[(round_number - 1) % len(self.trains)] if self.trains else every

    @property
    def needs_pair(self) -> bool:
        """True if the method treats A and B apart, and so needs a LoRA adapter."""
        return bool(self.trains) or self.aligns or self.changes_basis

    @property
    def works_under_masks(self) -> bool:
        """True if the server needs no more than a sum; noise for privacy has the same requirement."""
        return not self.sees_updates

    @property
    def freezes_a(self) -> bool:
        """True if A keeps the values that follow from the job's seed."""
        return self.trains == ("b",)

    def within(self, rule: Method) -> Method:
        """Returns this aggregation with a rule around it, with the needs and effects of both."""
        return replace(
            self,
            sees_updates=rule.sees_updates or self.sees_updates,
            equal_ranks=self.equal_ranks or rule.equal_ranks,
        )


AGGREGATIONS: Mapping[str, Method] = {
    "fedavg": Method(),
    "fedrot": Method(aligns=True, equal_ranks="turns whole factors"),
    "alternating": Method(trains=("b", "a")),
    "ffa": Method(trains=("b",)),
    "flexlora": Method(sees_updates="multiplies each client's factors", changes_basis=True),
    "flora": Method(sees_updates="multiplies each client's factors", changes_basis=True, keeps_residual=True),
}
RULE = Method(sees_updates="compares single updates", equal_ranks="compares whole updates")
"""The method of any robust rule in place of the mean."""
CLIPPING = Method(sees_updates="measures single updates")
"""The method of updates that the server scales down to a norm."""


def method_of(federation: FederationSettings) -> Method:
    """Returns the declaration of a job's aggregation with its rules around it."""
    method = AGGREGATIONS[federation.aggregation]
    if federation.robust != "none":
        method = method.within(RULE)
    return method if federation.clip_norm is None else method.within(CLIPPING)
