"""The requests to a client, by the types of Flower messages: both sides name them alike.

A round in the clear is one `TRAIN`. A secure round is `SECURE_EXCHANGES`, in their order;
`fedtune.strategies.secure_sum` says what each carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TRAIN, EVALUATE = "train", "evaluate"  # flwr.app.MessageType's
OPEN, SHARE, VOTE, UNMASK = "open", "share", "vote", "unmask"  # actions of query messages


def query(action: str) -> str:
    """Returns the message type of a query, as Flower writes it."""
    return f"query.{action}"


SECURE_EXCHANGES = (query(OPEN), query(SHARE), TRAIN, query(VOTE), query(UNMASK))


@dataclass(frozen=True)
class Request:
    """One message to a client, as plain values.

    Args:
        action: its message type.
        group: what the messages of one round have in common, such as the round's number.
        node: the number of the node that is asked.
        parts: payloads, `parts_of(action)` of them.
    """

    action: str
    group: str
    node: int
    parts: tuple[bytes, ...]


Handler = Callable[[str, Request], bytes]
"""(client, request) -> the payload of its reply; an error that it raises becomes an error reply."""


def parts_of(action: str) -> int:
    """How many payloads a message of this type carries: a round's configuration and the request open a secure round."""
    return 2 if action == query(OPEN) else 1


@dataclass(frozen=True)
class Refusal:
    """Why a device does not do what it was asked.

    Args:
        reason: a sentence for people; no program reads it.
        sits_out: whether one of its owner's conditions does not hold now. The device may be asked again later.
    """

    reason: str
    sits_out: bool = False
