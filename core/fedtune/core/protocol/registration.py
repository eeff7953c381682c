"""What a server and a device say to each other before any work: versions, the roster, the job, and the device's plan.

A device that speaks another protocol version is refused here, with a sentence, and not in the middle of a round. So is
one that the job does not fit: it plans for the job before it answers.

What a server learns of a plan says next to nothing of the device's data. The length to which examples are cut is the
job's, or, on a device short of memory that has longer ones, half of it or less; memory and seconds, on which lengths of
examples bear, are told to two digits. Battery, temperature and link stay on the device: the server hears which of its
owner's conditions does not hold, and no reading.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import PROTOCOL_VERSION, Base, Payload

ACTION = "query.registration"
"""The Flower message type that carries it."""

MAX_REGISTRATION_BYTES = 20 << 20

_Short = Annotated[str, Meta(max_length=200)]


class Terms(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What a device must know of a job to plan for it; keys are the job file's.

    Args:
        local_steps, local_epochs: one of them is 0.
        deadline: seconds of a round; 0 where it waits for all.
    """

    base: Base
    batch_tokens: Annotated[int, Meta(ge=8, le=1 << 24)]
    local_steps: Annotated[int, Meta(ge=0, le=1 << 20)]
    local_epochs: Annotated[float, Meta(ge=0, le=1e6)]
    weights: Literal["auto", "packed", "dequantized"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    gradient_checkpointing: bool
    deadline: Annotated[float, Meta(ge=0)]


class Registration(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What the server says.

    Args:
        version: the server's PROTOCOL_VERSION.
        software: the server's fedtune version, for people.
        job: what the server calls the job that comes next, the same across restarts; devices keep what they remember
            of a job under it.
        secure: whether updates will be masked; a device that wants that does not take part otherwise.
        terms: what to plan for.
        roster: the newest signed roster, as `SignedRoster.to_bytes` wrote it.
    """

    version: int
    software: _Short
    job: Annotated[str, Meta(min_length=1, max_length=200)]
    secure: bool
    terms: Terms
    roster: Annotated[bytes, Meta(max_length=16 << 20)]


class RegistrationReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What a device answers.

    Args:
        version: the device's PROTOCOL_VERSION.
        software: the device's fedtune version.
        roster_version: of the roster that the device holds now.
        cores: CPU cores.
        memory_mb: of the machine.
        accelerator: a GPU's name, or "".
        sits_out: which of its owner's conditions for taking part does not hold now, or "".
        rank: how many rank indices it trains: its tier.
        weights: how it holds the base.
        sequence_length: to which it cuts examples.
        peak_mb: predicted, of training, over the program itself.
        seconds: predicted, of a round.
    """

    version: int
    software: _Short
    roster_version: Annotated[int, Meta(ge=0, le=1 << 31)]
    cores: Annotated[int, Meta(ge=0, le=1 << 20)]
    memory_mb: Annotated[int, Meta(ge=0, le=1 << 40)]
    accelerator: _Short
    sits_out: _Short
    rank: Annotated[int, Meta(ge=1, le=1024)]
    weights: Literal["packed", "dequantized"]
    sequence_length: Annotated[int, Meta(ge=8, le=1 << 20)]
    peak_mb: Annotated[int, Meta(ge=1, le=1 << 30)]
    seconds: Annotated[float, Meta(gt=0, le=1e7)]


def two_digits(value: float) -> float:
    """Returns the value to two significant digits."""
    return float(f"{value:.1e}")


def check_plan(reply: RegistrationReply, terms: Terms) -> None:
    """Refuses a plan that cannot be one for these terms on that machine.

    Raises:
        PeerError: with everything that is wrong.
    """
    base = terms.base
    wrong = []
    if reply.rank > base.rank:
        wrong.append(f"rank {reply.rank}, and the job's is {base.rank}")
    if reply.sequence_length > base.sequence_length:
        wrong.append(f"sequences of {reply.sequence_length} tokens, and the job's have {base.sequence_length}")
    if terms.weights not in ("auto", reply.weights):
        wrong.append(f"weights {reply.weights}, and the job wants them {terms.weights}")
    if not reply.accelerator and reply.peak_mb > reply.memory_mb:  # a GPU has memory of its own
        wrong.append(f"{reply.peak_mb} MB for training on a machine of {reply.memory_mb} MB")
    if wrong:
        raise PeerError(f"its plan cannot be one: {'; '.join(wrong)}")


__all__ = [
    "ACTION",
    "MAX_REGISTRATION_BYTES",
    "PROTOCOL_VERSION",
    "Registration",
    "RegistrationReply",
    "Terms",
    "check_plan",
    "two_digits",
]
