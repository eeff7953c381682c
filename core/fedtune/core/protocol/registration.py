"""The registration: server and device exchange versions, the fleet's log, the job's manifest and the device's plan.

A device of another protocol version is refused here, with a sentence, and not in the middle of a round. So is a device
that the job does not fit: it plans for the job before it answers.

The plan that a server receives reveals very little about the device's data. The length to which examples are cut is the
job's, or, on a device short of memory that has longer examples, half of it or less. Memory and seconds, which depend on
the lengths of examples, are rounded to two digits. Readings of battery, temperature and link stay on the device: the
server only learns which of its owner's conditions does not hold.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import PROTOCOL_VERSION, Base, Payload

ACTION = "query.registration"
"""The Flower message type that carries it."""

MAX_REGISTRATION_BYTES = 20 << 20
MAX_MANIFEST_BYTES = 256 << 10

_Short = Annotated[str, Meta(max_length=200)]


class Registration(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The server's part of the registration.

    Args:
        version: PROTOCOL_VERSION of the server.
        software: fedtune version of the server, for people.
        manifest: the job, signed by the fleet's owner, as `JobManifest` has it.
        fleet: the fleet's log.
    """

    version: int
    software: _Short
    manifest: Annotated[bytes, Meta(max_length=MAX_MANIFEST_BYTES)]
    fleet: Annotated[bytes, Meta(max_length=16 << 20)]


class RegistrationReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The device's part of the registration.

    Args:
        version: PROTOCOL_VERSION of the device.
        software: fedtune version of the device.
        fleet_number: number of the last entry of the fleet's log that the device holds now.
        cores: number of CPU cores.
        memory_mb: memory of the machine.
        accelerator: name of a GPU, or "".
        sits_out: one of its owner's conditions for taking part that does not hold now, or "".
        rank: number of rank indices that it trains: its tier.
        weights: format of the base's weights on the device; "mapped" and "unpacked" are an edge pack's.
        sequence_length: length to which it cuts examples, in tokens.
        peak_mb: predicted peak memory of training, without the program itself.
        seconds: predicted duration of a round.
    """

    version: int
    software: _Short
    fleet_number: Annotated[int, Meta(ge=0, le=1 << 31)]
    cores: Annotated[int, Meta(ge=0, le=1 << 20)]
    memory_mb: Annotated[int, Meta(ge=0, le=1 << 40)]
    accelerator: _Short
    sits_out: _Short
    rank: Annotated[int, Meta(ge=1, le=1024)]
    weights: Literal["packed", "dequantized", "mapped", "unpacked"]
    sequence_length: Annotated[int, Meta(ge=8, le=1 << 20)]
    peak_mb: Annotated[int, Meta(ge=1, le=1 << 30)]
    seconds: Annotated[float, Meta(gt=0, le=1e7)]


def two_digits(value: float) -> float:
    """Returns the value to two significant digits."""
    return float(f"{value:.1e}")


def check_plan(reply: RegistrationReply, base: Base, weights: str) -> None:
    """Refuses a plan that is impossible for a job on that machine.

    Args:
        base: the job's base model and adapter.
        weights: the job's training.weights.

    Raises:
        PeerError: the plan has problems; the message lists all of them.
    """
    wrong = []
    if reply.rank > base.rank:
        wrong.append(f"rank {reply.rank}, and the job's is {base.rank}")
    if reply.sequence_length > base.sequence_length:
        wrong.append(f"sequences of {reply.sequence_length} tokens, and the job's have {base.sequence_length}")
    if weights not in ("auto", reply.weights):
        wrong.append(f"weights {reply.weights}, and the job wants them {weights}")
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
    "check_plan",
    "two_digits",
]
