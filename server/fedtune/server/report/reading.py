"""Reading of a run directory for a report, with all checks.

Clients choose their names and write some of the reasons, and people may edit the files. Hence the shape of every value
is checked, and all text passes through `clean` before it goes to a page.
"""

from __future__ import annotations

import json
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from pydantic import TypeAdapter, ValidationError

from fedtune.core.errors import RunDirectoryError
from fedtune.core.job.cost_settings import CostSettings
from fedtune.core.metrics import EXACT, MetricName
from fedtune.core.round_records import ClientEvaluation, Evaluation
from fedtune.server.costs.cost_ledger import CostedRound, CostLedger
from fedtune.server.run_directory import JOB, ROUNDS, SUMMARY, VIRTUAL, read_rounds, read_summary, read_virtual
from fedtune.strategies.evaluation_round import pooled

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Duration = Annotated[float, Meta(ge=0)]

_OVERRIDES = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # these reverse text
_UNPRINTABLE = frozenset({"Cc", "Cs"})  # control characters, lone surrogates


class Traffic(msgspec.Struct, frozen=True):
    """Payload bytes: `up` from clients to the server, `down` from the server to clients."""

    up: _Count
    down: _Count


class Client(msgspec.Struct, frozen=True):
    """The fields of a `fedtune.core.round_records.ClientRecord` that a report reads: one client in one round."""

    id: str
    loss: float | None
    seconds: _Duration
    answered: _Duration | None
    dropped: str | None


class Tier(msgspec.Struct, frozen=True):
    """The participation of one tier's clients; see `fedtune.server.run_rounds.tier_summary`."""

    tier: _Count
    asked: _Count
    merged: _Count
    sat_out: _Count
    updates: _Count
    share: _Share


class Device(msgspec.Struct, frozen=True):
    """One client of a simulated fleet in one round."""

    kind: str
    rank: _Count
    seconds: _Duration | None
    counts: bool


class VirtualRound(msgspec.Struct, frozen=True):
    """The fields of one line of virtual.jsonl that a report reads."""

    round: _Count
    seconds: _Duration
    clients: tuple[Device, ...]


@dataclass(frozen=True)
class Kind:
    """The participation of one kind of device in a run."""

    name: str
    rank: int
    asked: int
    updates: int
    share: float
    mean_seconds: float | None


class Sum(msgspec.Struct, frozen=True):
    """The sum that the server saw in a secure round; see `fedtune.core.round_records.SecureRecord`."""

    summed: _Count
    minimum: _Count
    threshold: _Count
    liars: tuple[str, ...]
    groups: _Count
    smallest: _Count


class HeldOut(msgspec.Struct, frozen=True):
    """The clients' exact match on their holdouts; None for a client that gave no score."""

    id: str
    eval: Evaluation | None


class Round(msgspec.Struct, frozen=True):
    """The fields of one line of rounds.jsonl that a report reads."""

    round: _Count
    seconds: _Duration
    train_loss: float | None
    aborted: str | None
    eval: Evaluation | None
    traffic: Traffic = msgspec.field(name="bytes")
    clients: tuple[Client, ...]
    client_evaluations: tuple[HeldOut, ...]
    secure: Sum | None
    notes: tuple[str, ...]

    @property
    def survivors(self) -> list[Client]:
        """The clients whose update is in the aggregate."""
        return [client for client in self.clients if client.dropped is None]

    def span(self, client: Client) -> tuple[float, float]:
        """Returns begin and end of a client's work in seconds of the round; hidden work begins with the round."""
        end = min(client.answered if client.answered is not None else self.seconds, self.seconds)
        return 0.0 if self.secure else max(end - client.seconds, 0.0), end

    @property
    def held_out(self) -> Evaluation | None:
        """All clients' scores together; None if they did not evaluate."""
        return pooled([ClientEvaluation(part.id, part.eval) for part in self.client_evaluations])


class Answer(msgspec.Struct, frozen=True):
    """A prompt and the model's answers to it."""

    prompt: str
    expected: str
    before: str
    after: str


class Entry(msgspec.Struct, frozen=True):
    """The number of messages for one purpose, and their total bytes."""

    messages: _Count
    bytes: _Count


class Summary(msgspec.Struct, frozen=True):
    """The fields of summary.json that a report reads."""

    clients: _Count
    eval_before: Evaluation | None
    traffic: dict[str, dict[str, Entry]]
    secure_aggregation: dict[str, Any]
    tiers: tuple[Tier, ...]
    fp32_fedavg_bytes: _Count
    adapter_parameters: _Count
    seconds: _Duration
    peak_rss_mb: _Duration
    versions: dict[str, str]
    base_digest: str
    adapter_digest: str
    answers: tuple[Answer, ...]
    privacy: dict[str, Any] | None = None
    ended: str | None = None


@dataclass(frozen=True)
class Run:
    """One run, finished or in progress.

    Args:
        name: the name of its directory.
        job: the text of job.toml.
        settings: the job's settings as "section.key" -> value.
        rounds: the rounds in order.
        summary: the summary; None while the run is in progress.
        ledger: the costs of the rounds.
        prices: the job's [cost].
        virtual: the rounds on a simulated fleet's virtual clock; empty without a fleet.
    """

    name: str
    job: str
    settings: dict[str, Any]
    rounds: tuple[Round, ...]
    summary: Summary | None
    ledger: CostLedger
    prices: CostSettings
    virtual: tuple[VirtualRound, ...] = ()

    @property
    def notes(self) -> Iterator[tuple[Round, str]]:
        """The notes of all rounds."""
        for line in self.rounds:
            for note in line.notes:
                yield line, note

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of a simulated fleet's devices that were asked, by name."""
        parts = [part for line in self.virtual for part in line.clients]
        counted = sum(part.counts for part in parts)
        kinds = []
        for name in sorted({part.kind for part in parts}):
            own = [part for part in parts if part.kind == name]
            seconds = [part.seconds for part in own if part.seconds is not None]
            updates = sum(part.counts for part in own)
            mean = sum(seconds) / len(seconds) if seconds else None
            share = updates / counted if counted else 0.0
            kinds.append(Kind(name, own[0].rank, len(own), updates, share, mean))
        return kinds

    @property
    def virtual_seconds(self) -> float:
        """The duration of the fleet's rounds on its virtual clock."""
        return sum(line.seconds for line in self.virtual)

    @property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """The server's evaluations as (round, evaluation after it), with round 0 for the untrained adapter."""
        before = [(0, self.summary.eval_before)] if self.summary else []
        return [(number, score) for number, score in [*before, *((r.round, r.eval) for r in self.rounds)] if score]

    @property
    def metric(self) -> MetricName:
        """The metric that the run is judged by; that of its last evaluation."""
        return self.evaluations[-1][1].metric if self.evaluations else EXACT

    @property
    def held_out(self) -> Round | None:
        """The last round in which a client gave a score."""
        return next((line for line in reversed(self.rounds) if line.held_out), None)

    @property
    def dropouts(self) -> Iterator[tuple[Round, Client, str]]:
        """Every client that dropped out of a round, and the reason."""
        for line in self.rounds:
            for client in line.clients:
                if client.dropped is not None:
                    yield line, client, client.dropped

    @property
    def moved(self) -> int:
        """The bytes moved so far, both ways."""
        return sum(line.traffic.up + line.traffic.down for line in self.rounds)

    @property
    def seconds(self) -> float:
        """The run's duration in seconds; while it is in progress, its rounds' duration."""
        return self.summary.seconds if self.summary else sum(line.seconds for line in self.rounds)


def read_run(path: Path) -> Run:
    """Reads job.toml, rounds.jsonl and, if the run is finished, summary.json.

    Raises:
        RunDirectoryError: the path is not a run directory, or a file in it is malformed; the message says where.
    """
    try:
        job = (path / JOB).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunDirectoryError(f"{path}: not a run directory; expected a {JOB} in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path / JOB}: cannot be read: {error}") from error
    try:
        settings = dict(_flat(tomllib.loads(job)))
    except tomllib.TOMLDecodeError as error:
        raise RunDirectoryError(f"{path / JOB}: not TOML: {error}") from error
    lines = read_rounds(path)
    rounds = _checked(lines, tuple[Round, ...], path / ROUNDS)
    ledger = CostLedger.of(_checked(lines, tuple[CostedRound, ...], path / ROUNDS))
    summary = _checked(read_summary(path), Summary, path / SUMMARY) if (path / SUMMARY).exists() else None
    virtual = _checked(read_virtual(path / VIRTUAL), tuple[VirtualRound, ...], path / VIRTUAL)
    return Run(path.resolve().name, job, settings, rounds, summary, ledger, _prices(settings, path / JOB), virtual)


def clean(text: str, limit: int) -> str:
    """Returns text that is safe to show: only printable characters that keep its direction, at most `limit` of them.

    Line breaks and tabs stay. The text is not escaped; the caller that writes it into markup escapes it.
    """
    shown = "".join(_shown(character) for character in text[:limit])
    return shown if len(text) <= limit else shown[:-1] + "…"


def clean_line(text: str, limit: int) -> str:
    """Returns the text of `clean` on one line."""
    return " ".join(clean(text, limit).split())


def names(records: Sequence[Round]) -> list[str]:
    """Returns the clients of the rounds, in order of first appearance."""
    return list(dict.fromkeys(client.id for line in records for client in line.clients))


_T = TypeVar("_T")


def _prices(settings: dict[str, Any], source: Path) -> CostSettings:
    """Returns the job's [cost]; a run of an earlier release has none."""
    section = "cost."
    found = {key.removeprefix(section): value for key, value in settings.items() if key.startswith(section)}
    try:
        return TypeAdapter(CostSettings).validate_json(json.dumps(found, default=str))
    except ValidationError as error:
        raise RunDirectoryError(f"{source}: not what a run writes: {error}") from error


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _checked(value: Any, kind: type[_T], source: Path) -> _T:
    try:
        json.dumps(value, allow_nan=False)
        return msgspec.convert(value, kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise RunDirectoryError(f"{source}: not what a run writes: {error}") from error


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    hidden = character in _OVERRIDES or unicodedata.category(character) in _UNPRINTABLE
    return "\ufffd" if hidden else character
