"""The budgets of a job: whether its run may begin another round.

    if reason := exhausted(ledger, job):        # a sentence
        ...                                     # the run ends, with all of its files

A round is not begun if one as costly as the mean of those so far would exceed a limit. The first round of a run always
begins, since nothing tells its cost. So a budget may be exceeded by what a round costs more than the mean, or by the
first one: in that, devices receive no trained adapter yet, and the second moves more bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedtune.core.job.settings import Job
from fedtune.core.text import counted
from fedtune.server.costs.cost_ledger import CostLedger, money

_WHOLE_FROM = 1000.0  # amounts without decimals


def exhausted(ledger: CostLedger, job: Job) -> str | None:
    """Returns the reason why the run ends before its next round; None while there is budget left."""
    rounds = ledger.rounds
    if not rounds:
        return None
    for key, limit, spent in _limits(ledger, job):
        if spent is None:  # a meter that fails does not stop a run
            continue
        if spent >= limit:
            return f"budget.{key} = {_shown(limit)} is spent: {_shown(spent)} after {counted(rounds, 'round')}"
        if spent + spent / rounds > limit:
            return (
                f"budget.{key} = {_shown(limit)} does not suffice for another round: {counted(rounds, 'round')} took "
                f"{_shown(spent)}, one of them {_shown(spent / rounds)} in the mean"
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


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= _WHOLE_FROM else f"{value:.4g}"
