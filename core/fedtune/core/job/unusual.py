"""Values of a job that are allowed and unusual: one table, whose rows give a warning each; nothing is refused.

    for warning in unusual(job, Surroundings(width=576, positions=8192)):
        display.note(warning)

A row looks at the job and at facts that the job file does not have; it says nothing where a fact is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtune.core.job.learning_rates import default_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.text import counted

FAR = 5.0  # times above or below the default at which a learning rate is unusual
USUAL_RANK = 64
USUAL_STEPS = 100
FEW_EXAMPLES = 4  # in an optimizer step
FEW_EVALUATED = 50
MOST_KEPT_BACK = 0.5


@dataclass(frozen=True)
class Surroundings:
    """Facts beside the job; None where they are unknown.

    Args:
        width: width of the base model.
        positions: longest sequence that the base supports.
        evaluated: number of the server's held-out examples.
        clients: number of clients of a simulation.
        example_tokens: mean number of tokens of an example.
    """

    width: int | None = None
    positions: int | None = None
    evaluated: int | None = None
    example_tokens: float | None = None
    clients: int | None = None


def unusual(job: Job, known: Surroundings) -> list[str]:
    """Returns a line for each unusual value: key, value, the usual range, and the reason."""
    warnings = (row(job, known) for row in _ROWS)
    return [f"unusual: {warning}" for warning in warnings if warning is not None]


def _learning_rate(job: Job, known: Surroundings) -> str | None:
    rate = job.training.learning_rate
    if rate is None or known.width is None:
        return None
    default = default_learning_rate(known.width, job.adapter.kind, job.training.optimizer)
    if default / FAR <= rate <= default * FAR:
        return None
    return (
        f"training.learning_rate = {rate:g}; usual is {default / FAR:g} to {default * FAR:g} for a base of "
        f"width {known.width} (the default is {default:g})"
    )


def _rank(job: Job, _: Surroundings) -> str | None:
    rank = job.adapter.rank
    if rank <= USUAL_RANK:
        return None
    return f"adapter.rank = {rank}; usual is 4 to {USUAL_RANK}: bytes and memory grow with it"


def _local_steps(job: Job, _: Surroundings) -> str | None:
    steps = job.training.local_steps
    if steps is None or steps <= USUAL_STEPS:
        return None
    return (
        f"training.local_steps = {steps}; usual is 1 to {USUAL_STEPS}: clients drift apart in long rounds. "
        "More rounds of fewer steps cost bytes instead"
    )


def _batch_tokens(job: Job, known: Surroundings) -> str | None:
    tokens, batch = known.example_tokens, job.training.batch_tokens
    if tokens is None or batch >= FEW_EXAMPLES * tokens:
        return None
    return (
        f"training.batch_tokens = {batch}; usual is {round(FEW_EXAMPLES * tokens)} or more, since an example has "
        f"{tokens:.0f} tokens on average: a step would see {batch / tokens:.1f} examples"
    )


def _evaluated(_: Job, known: Surroundings) -> str | None:
    count = known.evaluated
    if not count or count >= FEW_EVALUATED:
        return None
    interval = 98 / count**0.5  # points: 1.96 standard errors of a share of one half
    return (
        f"data.evaluation has {counted(count, 'example')}; usual is {FEW_EVALUATED} or more: a share is uncertain by "
        f"up to {interval:.0f} points either way (95%)"
    )


def _clients_per_round(job: Job, known: Surroundings) -> str | None:
    wanted, clients = job.federation.clients_per_round, known.clients
    if clients is None or not isinstance(wanted, int) or wanted <= clients:
        return None
    usual = f"usual is at most {clients}, the number of clients"
    return f"federation.clients_per_round = {wanted}; {usual}: all are in every round"


def _sequence_length(job: Job, known: Surroundings) -> str | None:
    length = job.data.sequence_length
    if known.positions is None or length <= known.positions:
        return None
    return (
        f"data.sequence_length = {length}; usual is at most {known.positions}, the longest sequence that the base "
        "was made for"
    )


def _holdout(job: Job, _: Surroundings) -> str | None:
    if job.data.holdout <= MOST_KEPT_BACK:
        return None
    return f"data.holdout = {job.data.holdout:g}; usual is 0 to {MOST_KEPT_BACK:g}: clients train on the rest alone"


def _together(job: Job, known: Surroundings) -> str | None:
    together, wanted, clients = job.simulation.together, job.federation.clients_per_round, known.clients
    if together == "auto" or clients is None:
        return None
    cohort = max(1, min(clients, wanted if isinstance(wanted, int) else round(wanted * clients)))
    if together <= cohort:
        return None
    return (
        f"simulation.together = {together}; usual is at most {cohort}, the clients of a round: a pass cannot have more"
    )


_ROWS: Sequence[Callable[[Job, Surroundings], str | None]] = (
    _learning_rate,
    _rank,
    _local_steps,
    _batch_tokens,
    _evaluated,
    _clients_per_round,
    _sequence_length,
    _holdout,
    _together,
)
