"""The ledger of a run's costs, summed up from the lines of rounds.jsonl; nothing in it is stored twice.

    ledger = CostLedger.read(lines)
    ledger.total.flops, ledger.by_purpose()["training"].up, money(ledger.total, job.cost)

Every cost belongs to a purpose: training, with the adapter on its way down and the updates on theirs up; aggregation,
with secure aggregation's own messages; evaluation, with its own. The first two also belong to a tier, where it is
clients that spend them. So sums over purposes, and over tiers with the rest, are the total.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fedtune.core.job.cost_settings import CostSettings
from fedtune.core.ledger import PROTOCOL
from fedtune.core.metrics import METRICS
from fedtune.core.round_records import WORK_PURPOSES, ClientEvaluation, EnergySource, Evaluation, Work, WorkPurpose
from fedtune.server.costs.power_process import JOULES_PER_KWH
from fedtune.strategies.evaluation_round import pooled

BYTES_PER_GB = 1e9
SECONDS_PER_HOUR = 3600.0
NEAR_BEST = 0.9  # share of the best quality whose cost is told where a job names no target

_LEAST_CERTAIN_FIRST: tuple[EnergySource, ...] = ("stated", "estimated", "measured")
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Amount = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True)
class Cost:
    """An amount of everything that a run costs. Costs can be added.

    Args:
        flops: floating-point operations.
        tokens: tokens computed, padding included.
        seconds: wall-clock time of the machine that runs the rounds.
        joules: energy of that machine; None where nothing tells it.
        up: payload bytes from clients to the server.
        down: payload bytes from the server to clients.
        device_seconds: time of devices; see cost.device_hour.
    """

    flops: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0
    up: int = 0
    down: int = 0
    device_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        joules = None if self.joules is None or other.joules is None else self.joules + other.joules
        return Cost(
            self.flops + other.flops,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            joules,
            self.up + other.up,
            self.down + other.down,
            self.device_seconds + other.device_seconds,
        )

    @property
    def bytes(self) -> int:
        """Payload bytes both ways."""
        return self.up + self.down


class Moved(msgspec.Struct, frozen=True):
    """The bytes for one purpose."""

    bytes: _Count


class CostedClient(msgspec.Struct, frozen=True):
    """The fields of a client's record that have costs."""

    tier: _Count
    seconds: _Amount
    answered: _Amount | None
    traffic: dict[str, dict[str, Moved]]


class Scored(msgspec.Struct, frozen=True):
    """A client's evaluation."""

    id: str
    eval: Evaluation | None
    traffic: dict[str, dict[str, Moved]]


class CostedRound(msgspec.Struct, frozen=True):
    """The fields of a line of rounds.jsonl that have costs; lines of earlier releases have no work."""

    round: _Count
    clients: tuple[CostedClient, ...]
    client_evaluations: tuple[Scored, ...]
    eval: Evaluation | None
    work: tuple[Work, ...] = ()
    energy: EnergySource | None = None

    @property
    def score(self) -> Evaluation | None:
        """The server's score after the round, or else that of the clients."""
        return self.eval or pooled([ClientEvaluation(part.id, part.eval) for part in self.client_evaluations])


@dataclass(frozen=True)
class CostEntry:
    """The cost of one round for one purpose and tier."""

    round: int
    purpose: WorkPurpose
    tier: int | None
    cost: Cost


@dataclass(frozen=True)
class CostLedger:
    """The costs of a run's rounds, and the scores that they led to."""

    entries: tuple[CostEntry, ...]
    scores: tuple[tuple[int, Evaluation], ...]
    rounds: int
    energy: EnergySource | None

    @classmethod
    def read(cls, lines: Sequence[Mapping[str, Any]]) -> CostLedger:
        """Reads the objects of rounds.jsonl.

        Raises:
            msgspec.ValidationError: they are not those of a run.
        """
        return cls.of(msgspec.convert(lines, tuple[CostedRound, ...]))

    @classmethod
    def of(cls, rounds: Sequence[CostedRound]) -> CostLedger:
        """Returns the ledger of a run's rounds."""
        entries = tuple(entry for line in rounds for entry in _entries(line))
        scores = tuple((line.round, line.score) for line in rounds if line.score is not None)
        sources = {line.energy for line in rounds}
        energy = next((source for source in _LEAST_CERTAIN_FIRST if source in sources), None)
        return cls(entries, scores, len(rounds), energy)

    @property
    def total(self) -> Cost:
        """The cost of everything."""
        return _sum(entry.cost for entry in self.entries)

    def by_purpose(self) -> dict[WorkPurpose, Cost]:
        """Returns the cost of each purpose."""
        return {
            purpose: _sum(entry.cost for entry in self.entries if entry.purpose == purpose) for purpose in WORK_PURPOSES
        }

    def by_tier(self) -> dict[int | None, Cost]:
        """Returns the cost of each tier, largest first; None has what belongs to no tier."""
        tiers = sorted({entry.tier for entry in self.entries if entry.tier is not None}, reverse=True)
        return {tier: _sum(entry.cost for entry in self.entries if entry.tier == tier) for tier in [*tiers, None]}

    def until(self) -> dict[int, Cost]:
        """Returns all that was spent until the end of each round."""
        numbers = list(dict.fromkeys(entry.round for entry in self.entries))
        single = [_sum(entry.cost for entry in self.entries if entry.round == number) for number in numbers]
        return dict(zip(numbers, accumulate(single), strict=True))


def money(cost: Cost, prices: CostSettings) -> float | None:
    """Returns what a cost is worth; None without a price, or where energy has one and nothing told the joules."""
    if not prices.priced:
        return None
    compute = compute_money(cost, prices)
    if compute is None:
        return None
    return compute + (cost.up * (prices.gb_up or 0.0) + cost.down * (prices.gb_down or 0.0)) / BYTES_PER_GB


def compute_money(cost: Cost, prices: CostSettings) -> float | None:
    """Returns the money for energy and for the time of machines, without that for bytes; None as for `money`."""
    if cost.joules is None and prices.kwh is not None:
        return None
    energy = (cost.joules or 0.0) / JOULES_PER_KWH * (prices.kwh or 0.0)
    hours = cost.seconds * (prices.hour or 0.0) + cost.device_seconds * (prices.device_hour or 0.0)
    return energy + hours / SECONDS_PER_HOUR


@dataclass(frozen=True)
class Reached:
    """The first score at a target or beyond, and all that was spent until then."""

    target: float
    round: int
    cost: Cost


def cost_to_target(ledger: CostLedger, target: float | None = None) -> Reached | None:
    """Returns what had been spent when a quality was first reached; None where it never was, or there is no score.

    Args:
        target: value of the run's metric; None for nine tenths of the best one, where more is better.
    """
    if not ledger.scores:
        return None
    metric = ledger.scores[-1][1].metric
    more = METRICS[metric].share
    values = [(number, value) for number, score in ledger.scores if (value := score.value(metric)) is not None]
    if target is None:
        best = max((value for _, value in values), default=0.0)
        if not more or best <= 0:
            return None
        target = NEAR_BEST * best
    spent = ledger.until()
    for number, value in values:
        if number in spent and (value >= target if more else value <= target):
            return Reached(target, number, spent[number])
    return None


def costs_json(ledger: CostLedger, prices: CostSettings) -> dict[str, Any]:
    """Returns the costs as the summary has them.

    Points are hundredths of exact match, or of another share, that the last score has over 0.
    """
    total = ledger.total
    worth, compute = money(total, prices), compute_money(total, prices)
    reached = cost_to_target(ledger, prices.target)

    def told(cost: Cost) -> dict[str, Any]:
        return {**asdict(cost), "money": money(cost, prices)}

    return {
        "total": told(total),
        "purposes": {purpose: told(cost) for purpose, cost in ledger.by_purpose().items()},
        "tiers": [{"tier": tier, **told(cost)} for tier, cost in ledger.by_tier().items()],
        "energy": ledger.energy,
        "currency": prices.currency if prices.priced else None,
        "compute_share": compute / worth if worth and compute is not None else None,
        "points_per_gflop": points_per_gflop(ledger),
        "target": {"value": reached.target, "round": reached.round, **told(reached.cost)} if reached else None,
    }


def points_per_gflop(ledger: CostLedger) -> float | None:
    """Returns the hundredths of the last score for each 10^9 operations; None where the metric is no share."""
    if not ledger.scores or not ledger.total.flops:
        return None
    score = ledger.scores[-1][1]
    value = score.value(score.metric) if METRICS[score.metric].share else None
    return None if value is None else 100 * value / (ledger.total.flops / 1e9)


def _entries(line: CostedRound) -> Iterator[CostEntry]:
    if not line.work:
        yield CostEntry(line.round, "training", None, Cost(joules=None))
    for part in line.work:
        cost = Cost(part.flops, part.tokens, part.seconds, part.joules)
        yield CostEntry(line.round, part.purpose, part.tier, cost)
    for client in line.clients:
        busy = client.seconds or client.answered or 0.0
        yield CostEntry(line.round, "training", client.tier, Cost(device_seconds=busy))
        yield from _traffic(line.round, client.traffic, client.tier)
    for scored in line.client_evaluations:
        yield from _traffic(line.round, scored.traffic, None)


def _traffic(number: int, traffic: Mapping[str, Mapping[str, Moved]], tier: int | None) -> Iterator[CostEntry]:
    for way, purposes in traffic.items():
        for name, moved in purposes.items():
            cost = Cost(up=moved.bytes) if way == "up" else Cost(down=moved.bytes)
            yield CostEntry(number, _purpose(name), tier, cost)


def _purpose(name: str) -> WorkPurpose:
    if name in PROTOCOL:
        return "aggregation"
    return "evaluation" if name == "evaluation" else "training"


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())
