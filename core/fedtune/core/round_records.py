"""The records of a run: one for each round, and in it one for each client, as plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from fedtune.core.ledger import Ledger
from fedtune.core.metrics import EXACT, LOSS, METRICS, MetricName, custom_figure


@dataclass(frozen=True)
class Evaluation:
    """The quality of an adapter on held-out examples.

    Args:
        loss: mean cross-entropy in nats over target tokens.
        exact_match: share of examples whose whole completion greedy decoding would reproduce.
        examples: number of examples.
        tokens: number of their target tokens.
        metric: metric that the run is judged by, a key of `fedtune.core.metrics.METRICS`.
        score: mean of that metric over examples with a prompt, if it compares generated answers; otherwise None.
        custom: name -> mean over examples with a prompt, of the metrics of the user's own (`fedtune.api.simulate`).
    """

    loss: float
    exact_match: float
    examples: int
    tokens: int
    metric: MetricName = EXACT
    score: float | None = None
    custom: Mapping[str, float] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """It is true if answers were generated for this evaluation."""
        return self.score is not None or bool(self.custom)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a float

    def value(self, metric: MetricName) -> float | None:
        """Returns the figure of a metric; None where it was not measured."""
        if metric in (EXACT, LOSS):
            return self.exact_match if metric == EXACT else self.loss
        return self.score if metric == self.metric else None

    def figures(self) -> list[tuple[str, str]]:
        """Returns label and figure of the run's own metric, then of exact match, loss and custom metrics, each once."""
        values = {metric: self.value(metric) for metric in dict.fromkeys((self.metric, EXACT, LOSS))}
        named = [(METRICS[key].label, METRICS[key].shown(value)) for key, value in values.items() if value is not None]
        return named + [(name, custom_figure(value)) for name, value in self.custom.items()]

    def to_json(self) -> dict[str, Any]:
        """Returns the values that a report needs."""
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """Reads what `to_json` wrote."""
        known = {"custom": {}} | dict(values)  # earlier releases had no custom metrics
        return cls(**{field.name: known[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class ClientRecord:
    """The record of one client of a cohort in a round.

    Args:
        tier: number of rank indices that it could train; 0 where its plan fits none of the job's tiers.
        rank: number of rank indices that it trained in this round; 0 where it sat out.
        dropped: reason why its update is not part of the aggregate; None for a survivor.
        seconds: duration of local training, as the client states it.
        answered: seconds from the round's start until its update had arrived, or would not come any more.
        traffic: messages and bytes between it and the server for its update.

    Under secure aggregation the server does not learn a client's examples, tokens, loss or seconds.
    """

    id: str
    tier: int = 0
    rank: int = 0
    examples: int = 0
    tokens: int = 0
    loss: float | None = None
    seconds: float = 0.0
    answered: float | None = None
    traffic: Ledger = field(default_factory=Ledger)
    dropped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the client's object in rounds.jsonl."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        bytes_ = {"bytes_up": self.traffic.bytes_up, "bytes_down": self.traffic.bytes_down}
        return values | bytes_ | {"traffic": self.traffic.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClientRecord:
        """Reads what `to_json` wrote."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**known | {"traffic": Ledger.from_json(values["traffic"])})


@dataclass(frozen=True)
class ClientEvaluation:
    """A client's evaluation on its held-out examples."""

    id: str
    evaluation: Evaluation | None
    traffic: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class SecureRecord:
    """The server's view of a round under secure aggregation, besides its participants and sizes.

    Args:
        summed: number of clients in the round's sums.
        minimum: number of survivors below which there is no sum; of several groups, the least.
        threshold: number of clients whose shares open the sum; of several groups, the least.
        liars: survivors that revealed a wrong share; the sum is correct in spite of them.
        groups: number of sums that the server saw, each over the clients of one group.
        smallest: number of clients in the sum over the fewest.
    """

    summed: int
    minimum: int
    threshold: int
    liars: tuple[str, ...] = ()
    groups: int = 1
    smallest: int = 0


WorkPurpose = Literal["training", "aggregation", "evaluation"]
WORK_PURPOSES: tuple[WorkPurpose, ...] = get_args(WorkPurpose)
EnergySource = Literal["measured", "estimated", "stated"]


@dataclass(frozen=True)
class Work:
    """The work of a round for one purpose, and of training for one tier; its bytes are in the traffic.

    Args:
        tier: number of rank indices that the clients could train; None where work has no tier.
        flops: floating-point operations, counted from the model's sizes (`fedtune.model.flops`).
        tokens: tokens computed, padding included.
        seconds: wall-clock time of the machine that runs the rounds.
        joules: energy of that machine; None where nothing tells it.
    """

    purpose: WorkPurpose
    tier: int | None = None
    flops: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    joules: float | None = None


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl.

    Args:
        notes: further decisions of the round, one sentence each, such as tiers that were merged or sat out.
        work: the work since the round before was stored, or since the run began; counted when this round is stored.
        energy: source of the work's joules; None without joules.
    """

    round: int
    seconds: float
    factors: str
    learning_rate: float
    clients: tuple[ClientRecord, ...]
    train_loss: float | None
    aborted: str | None = None
    eval: Evaluation | None = None
    client_evaluations: tuple[ClientEvaluation, ...] = field(default=())
    secure: SecureRecord | None = None
    notes: tuple[str, ...] = ()
    work: tuple[Work, ...] = ()
    energy: EnergySource | None = None

    @property
    def survivors(self) -> tuple[ClientRecord, ...]:
        """The clients whose update is part of the aggregate."""
        return tuple(client for client in self.clients if client.dropped is None)

    @property
    def traffic(self) -> Ledger:
        """All traffic between the server and the clients, evaluations included."""
        training = (client.traffic for client in self.clients)
        evaluation = (part.traffic for part in self.client_evaluations)
        return sum((*training, *evaluation), Ledger())

    def to_json(self) -> dict[str, Any]:
        """Returns the round's object for rounds.jsonl."""
        survivors, traffic = self.survivors, self.traffic
        up = sum(client.traffic.bytes_up for client in survivors)
        down = sum(client.traffic.bytes_down for client in self.clients)
        return {
            "round": self.round,
            "seconds": round(self.seconds, 3),
            "factors": self.factors,
            "learning_rate": self.learning_rate,
            "cohort": [client.id for client in self.clients],
            "survivors": [client.id for client in survivors],
            "train_loss": self.train_loss,
            "aborted": self.aborted,
            "notes": list(self.notes),
            "eval": self.eval.to_json() if self.eval else None,
            "bytes": {
                "up": traffic.bytes_up,
                "down": traffic.bytes_down,
                "up_per_client": round(up / len(survivors)) if survivors else 0,
                "down_per_client": round(down / len(self.clients)) if self.clients else 0,
                "secagg": traffic.protocol_bytes,
            },
            "traffic": traffic.to_json(),
            "secure": dataclasses.asdict(self.secure) if self.secure else None,
            "clients": [client.to_json() for client in self.clients],
            "client_evaluations": [
                {
                    "id": part.id,
                    "eval": part.evaluation.to_json() if part.evaluation else None,
                    "traffic": part.traffic.to_json(),
                }
                for part in self.client_evaluations
            ],
            "work": [dataclasses.asdict(part) for part in self.work],
            "energy": self.energy,
        }


class Tracker(Protocol):
    """An observer of a run as it happens: a display, a status page, a log of experiments.

    An error that it raises ends the run.
    """

    def client(self, record: ClientRecord) -> None:
        """Receives a client's record when its update is in or given up; later exchanges still add to its traffic."""

    def round(self, record: RoundRecord) -> None:
        """Receives a round's record when the round has ended and its state is stored."""
