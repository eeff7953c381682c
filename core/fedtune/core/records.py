"""What a run writes down: one record a round, and in it one a client. Plain values, ready for JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """How well an adapter does on held-out examples.

    Args:
        loss: mean cross-entropy in nats over target tokens.
        exact_match: share of examples whose whole completion greedy decoding would reproduce.
        examples: how many were evaluated.
        tokens: target tokens among them.
    """

    loss: float
    exact_match: float
    examples: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a float

    def to_json(self) -> dict[str, Any]:
        """The values a report needs."""
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True)
class ClientRecord:
    """What one client of a cohort did in a round.

    Args:
        dropped: why its update is not part of the aggregate; None for a survivor.
        seconds: of local training, as the client says.
        answered: seconds from the round's start until its reply was there.
    """

    id: str
    tier: str = "full"
    rank: int = 0
    examples: int = 0
    tokens: int = 0
    loss: float | None = None
    seconds: float = 0.0
    answered: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    dropped: str | None = None


@dataclass(frozen=True)
class ClientEvaluation:
    """One client's evaluation on what it keeps back."""

    id: str
    evaluation: Evaluation | None
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl."""

    round: int
    seconds: float
    factors: str
    learning_rate: float
    clients: tuple[ClientRecord, ...]
    train_loss: float | None
    aborted: str | None = None
    eval: Evaluation | None = None
    client_evaluations: tuple[ClientEvaluation, ...] = field(default=())

    @property
    def survivors(self) -> tuple[ClientRecord, ...]:
        """The clients whose update is part of the aggregate."""
        return tuple(client for client in self.clients if client.dropped is None)

    @property
    def bytes_up(self) -> int:
        """Payload bytes from all clients to the server, evaluations included."""
        return sum(c.bytes_up for c in self.clients) + sum(e.bytes_up for e in self.client_evaluations)

    @property
    def bytes_down(self) -> int:
        """Payload bytes from the server to all clients, evaluations included."""
        return sum(c.bytes_down for c in self.clients) + sum(e.bytes_down for e in self.client_evaluations)

    def to_json(self) -> dict[str, Any]:
        """The object that goes into rounds.jsonl."""
        survivors = self.survivors
        return {
            "round": self.round,
            "seconds": round(self.seconds, 3),
            "factors": self.factors,
            "learning_rate": self.learning_rate,
            "cohort": [client.id for client in self.clients],
            "survivors": [client.id for client in survivors],
            "train_loss": self.train_loss,
            "aborted": self.aborted,
            "eval": self.eval.to_json() if self.eval else None,
            "bytes": {
                "up": self.bytes_up,
                "down": self.bytes_down,
                "up_per_client": round(sum(c.bytes_up for c in survivors) / len(survivors)) if survivors else 0,
                "down_per_client": round(sum(c.bytes_down for c in self.clients) / len(self.clients))
                if self.clients
                else 0,
                "secagg": 0,
            },
            "clients": [dataclasses.asdict(client) for client in self.clients],
            "client_evaluations": [
                {"id": part.id, "eval": part.evaluation.to_json() if part.evaluation else None}
                for part in self.client_evaluations
            ],
        }
