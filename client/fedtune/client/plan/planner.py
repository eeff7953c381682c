"""From what a machine has to what it trains under: the first plan, in order of preference, that fits.

    plan = choose(shape, wishes, budget)

Order of choice: the sequence length that 95% of the data needs; the largest rank whose upload fits the link; the
fastest weights format that fits, checkpointing only where none fits without; the largest power-of-two micro-batch. Only
where nothing fits is the rank lowered, and then the sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtune.client.plan.memory import Choices, MemoryPrediction, Precision, Weights, predict_memory
from fedtune.core.errors import InputError
from fedtune.model.batches import LENGTH_STEP
from fedtune.model.shape import ModelShape

RESERVE = 0.25  # of the free memory stays free
UPLOAD_SHARE = 0.25  # of a round's deadline that may go to sending
SMALLEST_RANK = 4
SHORTEST_SEQUENCE = 64
QUANTILE = 0.95
BYTES_PER_PARAMETER_UP = 0.09  # of the default uplink: 20,792 bytes for 245,760 parameters (benchmarks/demo)
BYTES_PER_PARAMETER_DOWN = 0.13
# Fastest first: unpacking NF4 costs less than computing every block twice.
_FORMATS: tuple[tuple[Weights, bool], ...] = (
    ("dequantized", False),
    ("packed", False),
    ("dequantized", True),
    ("packed", True),
)


class NoPlanError(InputError):
    """Nothing that could be trained fits this device; the message has the numbers."""


@dataclass(frozen=True)
class Wishes:
    """What the job asks of every device.

    Args:
        quantization: of the reference base; without it there is nothing to pack.
        precision: of the arithmetic on this device.
        rank: r_max.
        sequence_length: the longest that shall be trained.
        batch_tokens: tokens an optimizer step.
        local_steps: optimizer steps a round.
        deadline: seconds of a round, or None.
        bandwidth_up, bandwidth_down: bytes a second, or None where unknown.
        cuda: whether memory is a GPU's.
        weights: a format the job insists on, or "auto".
        checkpointing: whether the job insists on it.
    """

    quantization: str
    precision: Precision
    rank: int
    sequence_length: int
    batch_tokens: int
    local_steps: int
    deadline: float | None = None
    bandwidth_up: float | None = None
    bandwidth_down: float | None = None
    cuda: bool = False
    weights: str = "auto"
    checkpointing: bool = False


@dataclass(frozen=True)
class Plan:
    """What one device trains under.

    Args:
        choices: what memory depends on; its rank is that of the whole adapter.
        tier: how many of its rank indices this device trains.
        accumulation: micro-batches an optimizer step.
        memory: predicted.
        budget: bytes that were allowed over what the process takes anyway.
        bytes_up, bytes_down: of a round, by the default compression.
    """

    choices: Choices
    tier: int
    accumulation: int
    memory: MemoryPrediction
    budget: int
    bytes_up: int
    bytes_down: int


def choose(shape: ModelShape, wishes: Wishes, budget: int, *, target_share: float = 1.0, kappa: float = 1.0) -> Plan:
    """The best plan whose predicted peak is within the budget.

    Args:
        budget: bytes over what the process takes before it loads the model.

    Raises:
        NoPlanError: nothing fits.
    """

    def predicted(choices: Choices) -> MemoryPrediction:
        return predict_memory(shape, choices, target_share=target_share, kappa=kappa)

    tier = affordable_rank(shape, wishes)
    smallest: tuple[int, Choices] | None = None
    for choices in _candidates(shape, wishes):
        peak = predicted(choices).peak
        if smallest is None or peak < smallest[0]:
            smallest = peak, choices
        if peak <= budget:
            most = max(1, wishes.batch_tokens // choices.sequence_length)
            while choices.micro_batch * 2 <= most:
                wider = replace(choices, micro_batch=choices.micro_batch * 2)
                if predicted(wider).peak > budget:
                    break
                choices = wider
            return _plan(shape, wishes, choices, tier, predicted(choices), budget)
    assert smallest is not None  # there is always a candidate
    peak, choices = smallest
    raise NoPlanError(
        f"{shape.name} does not fit this device: the smallest plan ({_describe(choices)}) needs "
        f"{megabytes(peak)} over the program itself, and {megabytes(max(budget, 0))} may be used "
        f"({RESERVE:.0%} of the free memory stay free)"
    )


def affordable_rank(shape: ModelShape, wishes: Wishes) -> int:
    """The largest rank of 4, 8, … r_max whose upload takes at most its share of the deadline.

    Raises:
        NoPlanError: even the smallest tier's upload takes longer.
    """
    tiers = rank_tiers(wishes.rank)
    if wishes.deadline is None or wishes.bandwidth_up is None:
        return tiers[-1]
    seconds = wishes.deadline * UPLOAD_SHARE
    fitting = [rank for rank in tiers if upload_bytes(shape, rank) <= seconds * wishes.bandwidth_up]
    if not fitting:
        needed = upload_bytes(shape, tiers[0])
        raise NoPlanError(
            f"sending a rank-{tiers[0]} update takes {needed / wishes.bandwidth_up:.0f} s for {needed:,} bytes at "
            f"{wishes.bandwidth_up:,.0f} bytes a second; {seconds:.0f} s of the round's deadline are for that"
        )
    return fitting[-1]


def rank_tiers(largest: int) -> tuple[int, ...]:
    """4, 8, 16, … and the largest itself."""
    tiers, rank = [], SMALLEST_RANK
    while rank < largest:
        tiers.append(rank)
        rank *= 2
    return (*tiers, largest)


def upload_bytes(shape: ModelShape, rank: int) -> int:
    """What an update of so many rank indices takes, by the default compression."""
    return round(shape.adapter_parameters(rank) * BYTES_PER_PARAMETER_UP)


def usual_length(lengths: Sequence[int], cap: int) -> int:
    """The sequence length that 95% of the examples need, padded, and at most the cap."""
    if not lengths:
        return cap
    wanted = int(np.ceil(np.quantile(np.asarray(lengths), QUANTILE)))
    return min(cap, -(-wanted // LENGTH_STEP) * LENGTH_STEP)


def megabytes(count: float) -> str:
    """In MB of a million bytes, or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _candidates(shape: ModelShape, wishes: Wishes) -> Iterator[Choices]:
    length = min(wishes.sequence_length, shape.positions)
    while True:
        for weights, checkpointing in _FORMATS:
            if weights == "packed" and wishes.quantization == "none":
                continue
            if wishes.weights not in ("auto", weights) or (wishes.checkpointing and not checkpointing):
                continue
            yield Choices(weights, wishes.precision, wishes.rank, length, 1, checkpointing, wishes.cuda)
        if length // 2 < SHORTEST_SEQUENCE:
            return
        length //= 2


def _plan(
    shape: ModelShape, wishes: Wishes, choices: Choices, tier: int, memory: MemoryPrediction, budget: int
) -> Plan:
    tokens = choices.micro_batch * choices.sequence_length
    return Plan(
        choices=choices,
        tier=tier,
        accumulation=max(1, -(-wishes.batch_tokens // tokens)),
        memory=memory,
        budget=budget,
        bytes_up=upload_bytes(shape, tier),
        bytes_down=round(shape.adapter_parameters(wishes.rank) * BYTES_PER_PARAMETER_DOWN),
    )


def _describe(choices: Choices) -> str:
    checkpointed = ", checkpointed" if choices.checkpointing else ""
    batch = f"{choices.micro_batch} × {choices.sequence_length} tokens"
    return f"{choices.weights}, {choices.precision}, {batch}{checkpointed}"
