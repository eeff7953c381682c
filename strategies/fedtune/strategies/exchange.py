"""One exchange of a round: a message to each of some clients, and what becomes of their answers.

for exchange in round_.exchanges():
    for name, parts in exchange.requests.items(): send parts to name as a message of exchange.message_type
    round_.take_in(name, payload)   or   round_.give_up(name, reason)       # each once, in any order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.core.ledger import Purpose


@dataclass(frozen=True)
class ClientFacts:
    """What an answer tells about its client beside its update; under secure aggregation nothing.

    Args:
        seconds: of local training, as the client says.
    """

    examples: int = 0
    tokens: int = 0
    loss: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Closing:
    """When an exchange goes on without those who have not answered.

    Args:
        seconds: after so many.
        enough: after so many answers.
        least: with fewer answers it waits on, whatever the time.
    """

    seconds: float
    enough: int
    least: int


@dataclass(frozen=True)
class Exchange:
    """What is asked of whom.

    Args:
        message_type: Flower's, by which a client knows what to do.
        requests: client -> the parts of its message; clients that are asked the same share the same bytes.
        down: what each part is for, in the ledger.
        up: what an answer is for, in the ledger.
        carries_adapter: whether who answers holds the adapter from now on.
        closing: None to wait for everybody, as long as the job's deadline allows.
    """

    message_type: str
    requests: Mapping[str, tuple[bytes, ...]]
    down: tuple[Purpose, ...]
    up: Purpose
    carries_adapter: bool = False
    closing: Closing | None = None
