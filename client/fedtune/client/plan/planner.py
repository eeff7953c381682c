"""The planner: chooses the first plan, in order of preference, that fits a machine.

    plan = choose(shape, constraints, budget)

Order of choice: the job's sequence length; the largest rank whose upload fits the link; the fastest weights format that
fits, with checkpointing only where none fits without it; whole steps, or micro-batches of a power of two of the longest
example. The sequence length is halved only where nothing else fits. With enough memory the plan is the one that a
simulation of the job uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedtune.client.plan.step_costs import PACK_WEIGHTS, Choices, Form, MemoryPrediction, predict_memory
from fedtune.core.adapter.layout import AdapterKind
from fedtune.core.errors import InputError
from fedtune.core.job.settings import Job, rank_tiers
from fedtune.data.batches import LENGTH_STEP
from fedtune.model.shape import ModelShape, Precision

RESERVE = 0.25  # of the free memory stays free
UPLOAD_SHARE = 0.25  # of a round's deadline that uploading may take
SHORTEST_SEQUENCE = 64
# Default compression, masked, with the protocol: 31,095 bytes up and 9,862 down for 33,600 numbers (benchmarks/demo); a
# device that takes part in one of ten rounds gets 25,000 for 67,200 (benchmarks/real).
BYTES_PER_PARAMETER_UP, BYTES_PER_PARAMETER_DOWN = 0.93, 0.37
# Fastest first: unpacking weights costs less than computing every block twice.
UNPACKING_FORMS: tuple[Form, ...] = (
    ("dequantized", False),
    ("packed", False),
    ("dequantized", True),
    ("packed", True),
)


class NoPlanError(InputError):
    """No plan fits this device; the message has the numbers."""


@dataclass(frozen=True)
class Constraints:
    """The constraints that the job and the device set for a plan.

    Args:
        quantization: quantization of the reference base; without it there is nothing to pack.
        precision: precision of the arithmetic on this device.
        rank: r_max.
        sequence_length: length to which the job cuts examples.
        longest: length of the longest example of this device, cut and padded; a plan provides for no longer one.
        batch_tokens: tokens in an optimizer step.
        local_steps: optimizer steps in a round.
        deadline: seconds of a round, or None.
        bandwidth_up, bandwidth_down: bytes a second, or None where unknown.
        cuda: whether memory is a GPU's.
        weights: a format that the job requires, or "auto".
        checkpointing: whether the job requires it.
        kind: kind of the adapter.
        forms: the forms that the device's library offers.
        threads: number of the library's threads.
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
    kind: AdapterKind = "lora"
    forms: Sequence[Form] = UNPACKING_FORMS
    threads: int = 1

    @classmethod
    def of(cls, job: Job, precision: Precision) -> Constraints:
        """Returns a job's constraints on a device of which only the arithmetic is known."""
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
            kind=job.adapter.kind,
        )


@dataclass(frozen=True)
class Plan:
    """The settings under which a device trains.

    Args:
        choices: the choices that determine memory; their rank is that of the whole adapter.
        tier: number of rank indices that this device trains.
        sequence_length: length to which this device cuts examples: the job's, or less where memory is short.
        accumulation: micro-batches in an optimizer step.
        memory: predicted memory.
        budget: permitted bytes over those that the process takes without a model.
        bytes_up, bytes_down: payload bytes of a round, by the default compression.
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
    """Returns the best plan whose predicted peak is within the budget.

    Mapped weights are not in that peak: the kernel drops their pages where memory is short, and reads them again. But
    a micro-batch is not widened at their cost.

    Args:
        budget: bytes over those that the process takes before it loads the model.

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
                if predicted(wider).peak + predicted(wider).mapped > budget:
                    break
                choices = wider
            return Plan(
                choices=choices,
                tier=tier,
                sequence_length=length,
                accumulation=-(-constraints.batch_tokens // choices.tokens),
                memory=predicted(choices),
                budget=budget,
                bytes_up=upload_bytes(shape, tier, constraints.kind),
                bytes_down=download_bytes(shape, constraints.rank, constraints.kind),
            )
    if smallest is None:
        raise NoPlanError(_no_form(constraints))
    peak, choices = smallest
    raise NoPlanError(
        f"the base model does not fit this device: the smallest plan ({_describe(choices)}) needs "
        f"{megabytes(peak)} over the program itself, and {megabytes(max(budget, 0))} may be used "
        f"({RESERVE:.0%} of the free memory stay free)"
    )


def affordable_rank(shape: ModelShape, constraints: Constraints) -> int:
    """Returns the largest rank of 4, 8, … r_max whose upload takes at most its share of the deadline.

    Raises:
        NoPlanError: even the smallest tier's upload takes longer.
    """
    tiers = rank_tiers(constraints.rank)
    if constraints.deadline is None or constraints.bandwidth_up is None:
        return tiers[-1]
    seconds = constraints.deadline * UPLOAD_SHARE
    most = seconds * constraints.bandwidth_up
    fitting = [rank for rank in tiers if upload_bytes(shape, rank, constraints.kind) <= most]
    if not fitting:
        needed = upload_bytes(shape, tiers[0], constraints.kind)
        raise NoPlanError(
            f"sending a rank-{tiers[0]} update takes {needed / constraints.bandwidth_up:.0f} s for {needed:,} bytes at "
            f"{constraints.bandwidth_up:,.0f} bytes a second; {seconds:.0f} s of the round's deadline are for that"
        )
    return fitting[-1]


def upload_bytes(shape: ModelShape, rank: int, kind: AdapterKind = "lora") -> int:
    """Returns the bytes of an update of `rank` rank indices, by the default compression."""
    return round(shape.adapter_parameters(kind, rank) * BYTES_PER_PARAMETER_UP)


def download_bytes(shape: ModelShape, rank: int, kind: AdapterKind = "lora") -> int:
    """Returns the bytes of the adapter's change, by the default compression."""
    return round(shape.adapter_parameters(kind, rank) * BYTES_PER_PARAMETER_DOWN)


def longest_example(lengths: Sequence[int], cap: int) -> int:
    """Returns the sequence length that the longest example needs, padded, and at most the cap."""
    return min(cap, -(-max(lengths, default=cap) // LENGTH_STEP) * LENGTH_STEP)


def megabytes(count: float) -> str:
    """Formats a number of bytes in MB (10^6) or GB (10^9)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _candidates(shape: ModelShape, constraints: Constraints) -> Iterator[tuple[int, Choices]]:
    """Yields the candidates, best first, with one example in a micro-batch: (cut length of examples, choices)."""
    length = min(constraints.sequence_length, shape.positions)
    while True:
        longest = min(length, constraints.longest)
        for weights, checkpointing in constraints.forms:
            if weights == "packed" and constraints.quantization == "none":
                continue
            if weights in PACK_WEIGHTS and constraints.precision != "fp32":
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
                    kind=constraints.kind,
                    quantization=constraints.quantization,
                    threads=constraints.threads,
                ),
            )
        if length // 2 < SHORTEST_SEQUENCE:
            return
        length //= 2


def _wider(tokens: int, whole: int) -> Iterator[int]:
    """Yields twice, four times, … as many tokens, and last a whole step."""
    while (tokens := tokens * 2) < whole:
        yield tokens
    yield whole


def _no_form(constraints: Constraints) -> str:
    offered = " or ".join(sorted({weights for weights, _ in constraints.forms}))
    return (
        f"this device can hold the base model {offered}, and the job wants training.weights = "
        f'"{constraints.weights}" in {constraints.precision}; edge packs are computed with in fp32 only'
    )


def _describe(choices: Choices) -> str:
    checkpointed = ", checkpointed" if choices.checkpointing else ""
    return f"{choices.weights}, {choices.precision}, {choices.tokens} tokens at once{checkpointed}"
