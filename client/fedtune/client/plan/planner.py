"""From what a machine has to what it trains under: the first plan, in order of preference, that fits.

    plan = choose(shape, constraints, budget)

Order of choice: the job's sequence length; the largest rank whose upload fits the link; the fastest weights format that
fits, checkpointing only where none fits without; whole steps, or micro-batches of a power of two of the longest
example. Only where nothing fits is the sequence length halved. With memory to spare the plan is what a simulation of
the job does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedtune.client.plan.step_costs import Choices, MemoryPrediction, predict_memory
from fedtune.core.errors import InputError
from fedtune.core.job.settings import Job, rank_tiers
from fedtune.data.batches import LENGTH_STEP
from fedtune.model.shape import ModelShape, Precision, Weights

RESERVE = 0.25  # of the free memory stays free
UPLOAD_SHARE = 0.25  # of a round's deadline that may go to sending
SHORTEST_SEQUENCE = 64
# Of the default, masked: 63,648 bytes up and 19,604 down for 245,760 parameters, protocol included (benchmarks/demo).
BYTES_PER_PARAMETER_UP, BYTES_PER_PARAMETER_DOWN = 0.26, 0.08
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
class Constraints:
    """What the job asks of every device.

    Args:
        quantization: of the reference base; without it there is nothing to pack.
        precision: of the arithmetic on this device.
        rank: r_max.
        sequence_length: to which the job cuts examples.
        longest: the longest example of this device, so cut and padded; the data is no reason to plan for more.
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
    longest: int
    batch_tokens: int
    local_steps: int
    deadline: float | None = None
    bandwidth_up: float | None = None
    bandwidth_down: float | None = None
    cuda: bool = False
    weights: str = "auto"
    checkpointing: bool = False

    @classmethod
    def of(cls, job: Job, precision: Precision) -> Constraints:
        """Gives what a job asks of a device of which nothing is known but its arithmetic."""
        training = job.training
        return cls(
            quantization=job.model.quantization,
            precision=precision,
            rank=job.adapter.rank,
            sequence_length=job.data.sequence_length,
            longest=job.data.sequence_length,
            batch_tokens=training.batch_tokens,
            local_steps=training.steps,
            weights=training.weights,
            checkpointing=training.gradient_checkpointing,
        )


@dataclass(frozen=True)
class Plan:
    """What one device trains under.

    Args:
        choices: what memory depends on; its rank is that of the whole adapter.
        tier: how many of its rank indices this device trains.
        sequence_length: to which this device cuts examples: the job's, or less where memory is short.
        accumulation: micro-batches an optimizer step.
        memory: predicted.
        budget: bytes that were allowed over what the process takes anyway.
        bytes_up, bytes_down: of a round, by the default compression.
    """

    choices: Choices
    tier: int
    sequence_length: int
    accumulation: int
    memory: MemoryPrediction
    budget: int
    bytes_up: int
    bytes_down: int


def choose(
    shape: ModelShape, constraints: Constraints, budget: int, *, target_share: float = 1.0, kappa: float = 1.0
) -> Plan:
    """The best plan whose predicted peak is within the budget.

    Args:
        budget: bytes over what the process takes before it loads the model.

    Raises:
        NoPlanError: nothing fits.
    """

    def predicted(choices: Choices) -> MemoryPrediction:
        return predict_memory(shape, choices, target_share=target_share, kappa=kappa)

    tier = affordable_rank(shape, constraints)
    smallest: tuple[int, Choices] | None = None
    for length, choices in _candidates(shape, constraints):
        peak = predicted(choices).peak
        if smallest is None or peak < smallest[0]:
            smallest = peak, choices
        if peak <= budget:
            for tokens in _wider(choices.tokens, constraints.batch_tokens):
                wider = replace(choices, tokens=tokens)
                if predicted(wider).peak > budget:
                    break
                choices = wider
            return Plan(
                choices=choices,
                tier=tier,
                sequence_length=length,
                accumulation=-(-constraints.batch_tokens // choices.tokens),
                memory=predicted(choices),
                budget=budget,
                bytes_up=upload_bytes(shape, tier),
                bytes_down=round(shape.adapter_parameters(constraints.rank) * BYTES_PER_PARAMETER_DOWN),
            )
    assert smallest is not None  # there is always a candidate
    peak, choices = smallest
    raise NoPlanError(
        f"the base model does not fit this device: the smallest plan ({_describe(choices)}) needs "
        f"{megabytes(peak)} over the program itself, and {megabytes(max(budget, 0))} may be used "
        f"({RESERVE:.0%} of the free memory stay free)"
    )


def affordable_rank(shape: ModelShape, constraints: Constraints) -> int:
    """The largest rank of 4, 8, … r_max whose upload takes at most its share of the deadline.

    Raises:
        NoPlanError: even the smallest tier's upload takes longer.
    """
    tiers = rank_tiers(constraints.rank)
    if constraints.deadline is None or constraints.bandwidth_up is None:
        return tiers[-1]
    seconds = constraints.deadline * UPLOAD_SHARE
    fitting = [rank for rank in tiers if upload_bytes(shape, rank) <= seconds * constraints.bandwidth_up]
    if not fitting:
        needed = upload_bytes(shape, tiers[0])
        raise NoPlanError(
            f"sending a rank-{tiers[0]} update takes {needed / constraints.bandwidth_up:.0f} s for {needed:,} bytes at "
            f"{constraints.bandwidth_up:,.0f} bytes a second; {seconds:.0f} s of the round's deadline are for that"
        )
    return fitting[-1]


def upload_bytes(shape: ModelShape, rank: int) -> int:
    """What an update of so many rank indices takes, by the default compression."""
    return round(shape.adapter_parameters(rank) * BYTES_PER_PARAMETER_UP)


def longest_example(lengths: Sequence[int], cap: int) -> int:
    """The sequence length that the longest example needs, padded, and at most the cap."""
    return min(cap, -(-max(lengths, default=cap) // LENGTH_STEP) * LENGTH_STEP)


def megabytes(count: float) -> str:
    """In MB of a million bytes, or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _candidates(shape: ModelShape, constraints: Constraints) -> Iterator[tuple[int, Choices]]:
    """What may be chosen, best first, one example a micro-batch: (length to which examples are cut, choices)."""
    length = min(constraints.sequence_length, shape.positions)
    while True:
        longest = min(length, constraints.longest)
        for weights, checkpointing in _FORMATS:
            if weights == "packed" and constraints.quantization == "none":
                continue
            if constraints.weights not in ("auto", weights) or (constraints.checkpointing and not checkpointing):
                continue
            yield (
                length,
                Choices(
                    weights=weights,
                    precision=constraints.precision,
                    rank=constraints.rank,
                    sequence_length=longest,
                    tokens=longest,
                    checkpointing=checkpointing,
                    cuda=constraints.cuda,
                ),
            )
        if length // 2 < SHORTEST_SEQUENCE:
            return
        length //= 2


def _wider(tokens: int, whole: int) -> Iterator[int]:
    """Twice, four times, … as many tokens, and last a whole step."""
    while (tokens := tokens * 2) < whole:
        yield tokens
    yield whole


def _describe(choices: Choices) -> str:
    checkpointed = ", checkpointed" if choices.checkpointing else ""
    return f"{choices.weights}, {choices.precision}, {choices.tokens} tokens at once{checkpointed}"
