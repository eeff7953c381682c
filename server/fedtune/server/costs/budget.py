"""The budgets of a job: whether its run may begin another round.

    if reason := exhausted(ledger, job):        # a sentence
        ...                                     # the run ends, with all of its files

A round is not begun if one as costly as the mean of those so far would exceed a limit. The first round of a run always
begins, since nothing tells its cost; so it may exceed a budget that is smaller than one round.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.core.job.settings import Job
from fedtune.core.text import counted
from fedtune.server.costs.cost_ledger import CostLedger, money


def exhausted(ledger: CostLedger, job: Job) -> str | None:
    """Returns the reason why the run ends before its next round; None while there is budget left."""
    rounds = ledger.rounds
    if not rounds:
        return None
    for key, limit, spent in _limits(ledger, job):
        if spent is None:  # a meter that fails does not stop a run
            continue
        if spent >= limit:
            return f"budget.{key} = {limit:g} is spent: {spent:,.4g} after {counted(rounds, 'round')}"
        if spent + spent / rounds > limit:
            return (
                f"budget.{key} = {limit:g} does not suffice for another round: {counted(rounds, 'round')} took "
                f"{spent:,.4g}, one of them {spent / rounds:,.4g} in the mean"
            )
    return None


def _limits(ledger: CostLedger, job: Job) -> Iterator[tuple[str, float, float | None]]:
    """Yields key, limit and what is spent of it, for each limit of the job."""
    budget, total = job.budget, ledger.total
    spent: dict[str, float | None] = {
        "bytes": total.bytes,
        "joules": total.joules,
        "money": money(total, job.cost),
        "seconds": total.seconds,
    }
    for key, amount in spent.items():
        limit = getattr(budget, key)
        if limit is not None:
            yield key, limit, amount
