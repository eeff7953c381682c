"""What a client can be asked, as the types of Flower messages: both sides name them alike.

A round in the clear is one `TRAIN`. A secure round is `SECURE_EXCHANGES`, in their order;
`fedtune.strategies.secure_collection` says what each carries.
"""

from __future__ import annotations

TRAIN, EVALUATE = "train", "evaluate"  # flwr.app.MessageType's
OPEN, SHARE, VOTE, UNMASK = "open", "share", "vote", "unmask"  # actions of query messages


def query(action: str) -> str:
    """The message type of a query, as Flower writes it."""
    return f"query.{action}"


SECURE_EXCHANGES = (query(OPEN), query(SHARE), TRAIN, query(VOTE), query(UNMASK))
