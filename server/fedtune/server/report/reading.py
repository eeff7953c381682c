"""A run directory, read and checked for a report.

Clients chose their names and wrote some of the reasons, and a person may have edited the files: nothing here is trusted
to have the shape it should, and no text goes to a page but through `clean`.
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

from fedtune.core.errors import RunDirectoryError
from fedtune.core.round_records import ClientEvaluation, Evaluation
from fedtune.server.run_directory import JOB, ROUNDS, SUMMARY, VIRTUAL, read_rounds, read_summary, read_virtual
from fedtune.strategies.evaluation_round import pooled

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Duration = Annotated[float, Meta(ge=0)]

_OVERRIDES = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # turn text around
_UNPRINTABLE = frozenset({"Cc", "Cs"})  # control characters, lone surrogates


class Traffic(msgspec.Struct, frozen=True):
    """Payload bytes: `up` from clients to the server, `down` from the server to clients."""

    up: _Count
    down: _Count


class Client(msgspec.Struct, frozen=True):
    """The part of one client in one round that a report reads; see `fedtune.core.round_records.ClientRecord`."""

    id: str
    loss: float | None
    seconds: _Duration
    answered: _Duration | None
    dropped: str | None


class Tier(msgspec.Struct, frozen=True):
    """How the clients of one tier took part; see `fedtune.server.run_rounds.tier_summary`."""

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
    """The part of one line of virtual.jsonl that a report reads."""

    round: _Count
    seconds: _Duration
    clients: tuple[Device, ...]


@dataclass(frozen=True)
class Kind:
    """How one kind of device took part in a run."""

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


class HeldOut(msgspec.Struct, frozen=True):
    """One client's score on what it keeps back; None where it gave none."""

    id: str
    eval: Evaluation | None


class Round(msgspec.Struct, frozen=True):
    """The part of one line of rounds.jsonl that a report reads."""

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
        """The clients whose update is part of the aggregate."""
        return [client for client in self.clients if client.dropped is None]

    def span(self, client: Client) -> tuple[float, float]:
        """From when to when a client worked, in seconds of the round; where its time is hidden, from the start."""
        end = min(client.answered if client.answered is not None else self.seconds, self.seconds)
        return 0.0 if self.secure else max(end - client.seconds, 0.0), end

    @property
    def held_out(self) -> Evaluation | None:
        """All clients' scores as one; None where they did not evaluate."""
        return pooled([ClientEvaluation(part.id, part.eval) for part in self.client_evaluations])


class Answer(msgspec.Struct, frozen=True):
    """A prompt and what the model made of it."""

    prompt: str
    expected: str
    before: str
    after: str


class Entry(msgspec.Struct, frozen=True):
    """How many messages travelled for a purpose, and their bytes together."""

    messages: _Count
    bytes: _Count


class Summary(msgspec.Struct, frozen=True):
    """The part of summary.json that a report reads."""

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


@dataclass(frozen=True)
class Run:
    """One run, finished or under way.

    Args:
        name: of its directory.
        job: the text of job.toml.
        settings: the same as "section.key" -> value.
        rounds: in order.
        summary: None while the run is under way.
        virtual: rounds as a simulated fleet's clock saw them; none without a fleet.
    """

    name: str
    job: str
    settings: dict[str, Any]
    rounds: tuple[Round, ...]
    summary: Summary | None
    virtual: tuple[VirtualRound, ...] = ()

    @property
    def notes(self) -> Iterator[tuple[Round, str]]:
        """Every round's notes."""
        for line in self.rounds:
            for note in line.notes:
                yield line, note

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of a simulated fleet that were asked, by name."""
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
        """How long the fleet's rounds took on its clock."""
        return sum(line.seconds for line in self.virtual)

    @property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """(round, the server's evaluation after it), with round 0 for the untrained adapter."""
        before = [(0, self.summary.eval_before)] if self.summary else []
        return [(number, score) for number, score in [*before, *((r.round, r.eval) for r in self.rounds)] if score]

    @property
    def held_out(self) -> Round | None:
        """The last round in which a client gave a score."""
        return next((line for line in reversed(self.rounds) if line.held_out), None)

    @property
    def dropouts(self) -> Iterator[tuple[Round, Client, str]]:
        """Every client that a round lost, and why."""
        for line in self.rounds:
            for client in line.clients:
                if client.dropped is not None:
                    yield line, client, client.dropped

    @property
    def moved(self) -> int:
        """Bytes both ways so far."""
        return sum(line.traffic.up + line.traffic.down for line in self.rounds)

    @property
    def seconds(self) -> float:
        """Spent on the run; while it is under way, on its rounds."""
        return self.summary.seconds if self.summary else sum(line.seconds for line in self.rounds)


def read_run(path: Path) -> Run:
    """Reads job.toml, rounds.jsonl and, where the run is finished, summary.json.

    Raises:
        RunDirectoryError: it is not a run directory, or a file in it is not what it should be; says where.
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
    rounds = _checked(read_rounds(path), tuple[Round, ...], path / ROUNDS)
    summary = _checked(read_summary(path), Summary, path / SUMMARY) if (path / SUMMARY).exists() else None
    virtual = _checked(read_virtual(path / VIRTUAL), tuple[VirtualRound, ...], path / VIRTUAL)
    return Run(path.resolve().name, job, settings, rounds, summary, virtual)


def clean(text: str, limit: int) -> str:
    """Text as a page can bear it: whole characters only, nothing that turns the line around, at most `limit` long.

    Line breaks and tabs stay. It is not escaped: that is for whoever writes it into markup.
    """
    shown = "".join(_shown(character) for character in text[:limit])
    return shown if len(text) <= limit else shown[:-1] + "…"


def clean_line(text: str, limit: int) -> str:
    """As `clean`, on one line."""
    return " ".join(clean(text, limit).split())


def names(records: Sequence[Round]) -> list[str]:
    """The clients of the rounds, in order of first appearance."""
    return list(dict.fromkeys(client.id for line in records for client in line.clients))


_T = TypeVar("_T")


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
