"""Every method declares here, once, what it needs and does; devices, server and the checks of a job read this table.

    method = method_of(job.federation)
    if job.hides_updates and not method.works_under_masks: ...

An aggregation is declared by itself, and so is each rule that may go around it; `Method.within` composes the two.
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
        trains: the factors that rounds train, one entry a round, over and over.
        aligns: devices turn their factors towards the received ones before they send them.
        sees_updates: why a sum of updates is not enough, as the end of "..., which ..."; "" where it is.
        equal_ranks: why all clients must train the same rank, likewise; "" where they need not.
        changes_basis: every round writes both factors in another basis, so whatever belongs to a basis ends with it:
            residuals, coarse changes, moments of a server optimizer.
        keeps_residual: the server keeps part of the result, which no adapter of the job's rank holds.
    """

    trains: tuple[Factors, ...] = ("ab",)
    aligns: bool = False
    sees_updates: str = ""
    equal_ranks: str = ""
    changes_basis: bool = False
    keeps_residual: bool = False

    def factors(self, round_number: int) -> Factors:
        """Returns the factors that clients train and send in this round; rounds count from 1."""
        return self.trains[(round_number - 1) % len(self.trains)]

    @property
    def works_under_masks(self) -> bool:
        """Returns whether the server needs no more than a sum; noise for privacy needs the same."""
        return not self.sees_updates

    @property
    def works_with_tiers(self) -> bool:
        """Returns whether clients may train different ranks."""
        return not self.equal_ranks

    @property
    def freezes_a(self) -> bool:
        """Returns whether A stays as the job's seed made it."""
        return all(factors == "b" for factors in self.trains)

    def within(self, rule: Method) -> Method:
        """This aggregation with a rule around it: what either needs, both need."""
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
"""A robust rule, whichever, in place of the mean."""
CLIPPING = Method(sees_updates="measures single updates")
"""Updates scaled down to a length by the server."""


def method_of(federation: FederationSettings) -> Method:
    """Returns the declaration of a job's aggregation with its rules around it."""
    method = AGGREGATIONS[federation.aggregation]
    if federation.robust != "none":
        method = method.within(RULE)
    return method if federation.clip_norm is None else method.within(CLIPPING)
