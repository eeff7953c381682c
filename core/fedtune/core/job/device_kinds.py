"""A simulated fleet: kinds of device, their counts and capabilities, from which a simulation computes its time line.

    fleet = load_fleet(Path("fleet.toml"))          # [[kind]] name = "phone" count = 50 tokens_per_second = 600 ...
    kinds = fleet.assign(["ann", "bob", ...], seed)  # client name -> Kind

Unknown keys, wrong types and impossible values are all reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedtune.core.errors import JobError
from fedtune.core.job.job_file import read_table
from fedtune.core.seeds import generator

MAX_FLEET_BYTES = 1 << 20
MAX_KINDS = 1000

_STRICT = ConfigDict(extra="forbid", strict=True)
_Rate = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
_Chance = Annotated[float, Field(gt=0, le=1)]
_Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=_STRICT)
class Kind:
    """One kind of device.

    Args:
        count: number of devices of this kind; with another number of clients, its share.
        memory_mb: memory that a training process may use, in MB.
        tokens_per_second: speed of training steps.
        uplink_kbit, downlink_kbit: kilobits per second.
        availability: probability that a device can be reached in a round.
        charging: probability that it is charging, or has enough battery.
        cool: probability that it is not too hot to train.
        unmetered: probability that its link costs nothing.
        failure_rate: probability that a device that was asked vanishes.
        jitter: standard deviation of the logarithm of a device's time, from round to round.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    count: Annotated[int, Field(ge=1, le=1_000_000)]
    memory_mb: _Rate
    tokens_per_second: _Rate
    uplink_kbit: _Rate
    downlink_kbit: _Rate
    availability: _Chance = 1.0
    charging: _Chance = 1.0
    cool: _Chance = 1.0
    unmetered: _Chance = 1.0
    failure_rate: _Probability = 0.0
    jitter: Annotated[float, Field(ge=0, le=3)] = 0.0

    @property
    def eligibility(self) -> dict[str, float]:
        """The conditions for a device to train in a round, each with its probability, independent of the others."""
        return {
            "reachable": self.availability,
            "charging": self.charging,
            "cool": self.cool,
            "unmetered": self.unmetered,
        }

    def seconds(self, tokens: float, bytes_up: float, bytes_down: float) -> float:
        """Returns t = tokens / tokens_per_second + bytes_up / bandwidth_up + bytes_down / bandwidth_down."""
        up, down = (rate * 1000 / 8 for rate in (self.uplink_kbit, self.downlink_kbit))
        return tokens / self.tokens_per_second + bytes_up / up + bytes_down / down


@dataclass(frozen=True, config=_STRICT)
class Fleet:
    """All kinds of a fleet."""

    kind: Annotated[tuple[Kind, ...], Field(min_length=1, max_length=MAX_KINDS)]

    def assign(self, names: Sequence[str], seed: int) -> dict[str, Kind]:
        """Assigns a kind to every client: in the fleet's shares (largest remainders), at random from the seed."""
        total = sum(kind.count for kind in self.kind)
        exact = [len(names) * kind.count / total for kind in self.kind]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
        for index in by_remainder[: len(names) - sum(counts)]:
            counts[index] += 1
        dealt = [kind for kind, count in zip(self.kind, counts, strict=True) for _ in range(count)]
        order = generator(seed, "fleet").permutation(len(names))
        return {name: dealt[index] for name, index in zip(sorted(names), order, strict=True)}


def load_fleet(path: Path) -> Fleet:
    """Reads a fleet file.

    Raises:
        JobError: with every problem found.
    """
    table = read_table(path, "a fleet file", MAX_FLEET_BYTES)
    kinds = table.pop("kind", None)
    problems = [f"{key}: unknown key; expected only [[kind]]" for key in table]
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, dict) for kind in kinds):
        raise JobError([*problems, "no [[kind]]; expected at least one kind of device"], path)
    if len(kinds) > MAX_KINDS:
        raise JobError([*problems, f"{len(kinds)} kinds; expected at most {MAX_KINDS}"], path)
    read = []
    for number, kind in enumerate(kinds, start=1):
        where = f"kind {number}" + (f" ({kind['name']})" if isinstance(kind.get("name"), str) else "")
        try:  # through JSON, where strict mode still accepts a table for a dataclass
            read.append(TypeAdapter(Kind).validate_json(json.dumps(kind, default=str)))
        except ValidationError as error:
            problems += [f"{where}: {_sentence(detail)}" for detail in error.errors()]
    names = [kind.name for kind in read]
    problems += [f"two kinds are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise JobError(problems, path)
    return Fleet(tuple(read))


def _sentence(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key; expected one of {', '.join(field.name for field in fields(Kind))}"
    if detail["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: expected {str(detail['msg']).removeprefix('Input should be ')}, got {detail['input']!r}"
