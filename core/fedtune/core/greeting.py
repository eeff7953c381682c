"""What a server and a device say to each other before any work: versions, the roster, and what the device is.

A device that speaks another protocol version is refused here, with a sentence, and not in the middle of a round.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedtune.core.messages import PROTOCOL_VERSION, Payload

ACTION = "query.greeting"
"""The Flower message type that carries it."""

MAX_GREETING_BYTES = 20 << 20

_Short = Annotated[str, Meta(max_length=200)]


class Greeting(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What the server says.

    Args:
        version: the server's PROTOCOL_VERSION.
        software: the server's fedtune version, for people.
        job: what the server calls the job that comes next, the same across restarts; devices keep what they remember
            of a job under it.
        secure: whether updates will be masked; a device that wants that does not take part otherwise.
        roster: the newest signed roster, as `SignedRoster.to_bytes` wrote it.
    """

    version: int
    software: _Short
    job: Annotated[str, Meta(min_length=1, max_length=200)]
    secure: bool
    roster: Annotated[bytes, Meta(max_length=16 << 20)]


class GreetingReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What a device answers.

    Args:
        version: the device's PROTOCOL_VERSION.
        software: the device's fedtune version.
        roster_version: of the roster that the device holds now.
        cores: CPU cores.
        memory_mb: of the machine.
        accelerator: a GPU's name, or "".
    """

    version: int
    software: _Short
    roster_version: Annotated[int, Meta(ge=0, le=1 << 31)]
    cores: Annotated[int, Meta(ge=0, le=1 << 20)]
    memory_mb: Annotated[int, Meta(ge=0, le=1 << 40)]
    accelerator: _Short


__all__ = ["ACTION", "MAX_GREETING_BYTES", "PROTOCOL_VERSION", "Greeting", "GreetingReply"]
