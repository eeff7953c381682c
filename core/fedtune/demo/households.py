"""The demo's data: households with their requests as training clients, and an evaluation set without their requests.

Every household owns a few devices and requests only their functions, so clients are non-IID by nature. The slot values
of a request, and no seed, decide whether it is held out:

    held out  iff  (sum of the slots' value indices) mod HOLD_OUT_EVERY == 0

so training and evaluation share no combination of slot values, for any seeds and sizes. All randomness is a
`random.Random` bound to (seed, purpose, household): the same seed gives the same rows on every platform.
"""

from __future__ import annotations

import json
import random
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from fedtune.demo.federated_skills import FEDERATED_SKILLS
from fedtune.demo.skills import Function, Skill, format_prompt

HOLD_OUT_EVERY = 5
DEVICES_PER_HOUSEHOLD = 3
EXAMPLES_PER_HOUSEHOLD = 200
EVALUATION_SIZE = 240
DRAWS = 1_000
"""Attempts to draw a request that a household has not made yet; the smallest function has thousands of requests."""


class Row(TypedDict):
    """One line of a demo JSONL file."""

    prompt: str
    completion: str
    skill: str


@dataclass(frozen=True)
class Household:
    """One client of the demo: the devices that it owns, which are federated skills, and the requests to them.

    The requests follow from the rest; a thousand households that kept them would take 80 MB.
    """

    index: int
    owned: tuple[Skill, ...]
    seed: int
    examples: int

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of its devices."""
        return tuple(skill.name for skill in self.owned)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Its requests, made again by every call.

        Raises:
            ValueError: there are not so many different ones.
        """
        rng = random.Random(f"{self.seed}/household/{self.index}")
        return tuple(_rows(rng, self.owned, self.examples, held_out=False))


def make_households(count: int, seed: int, examples_each: int = EXAMPLES_PER_HOUSEHOLD) -> list[Household]:
    """Returns `count` households, each with `DEVICES_PER_HOUSEHOLD` devices and `examples_each` rows.

    Devices are dealt from shuffled decks of all skills, so that any 3 consecutive households own all skills, and 10 or
    1,000 households own every skill about equally often.
    """
    deal = _deal_skills(random.Random(f"{seed}/devices"))
    return [
        Household(index, tuple(_distinct(deal, DEVICES_PER_HOUSEHOLD)), seed, examples_each) for index in range(count)
    ]


def make_evaluation(size: int = EVALUATION_SIZE, seed: int = 0) -> list[Row]:
    """Returns `size` rows over all federated skills and functions in equal parts, all with held-out slot values."""
    return _rows(random.Random(f"{seed}/evaluation"), FEDERATED_SKILLS, size, held_out=True)


def write_federation(
    directory: Path,
    clients: int,
    seed: int,
    examples_each: int = EXAMPLES_PER_HOUSEHOLD,
    evaluation_size: int = EVALUATION_SIZE,
) -> None:
    """Writes `clients/NNN.jsonl`, one file per household, and `eval.jsonl` under `directory`.

    File names are zero-padded to one width, so that sorting them gives the households in order.
    """
    folder = directory / "clients"
    folder.mkdir(parents=True, exist_ok=True)
    width = max(3, len(str(clients - 1)))
    for household in make_households(clients, seed, examples_each):
        _write_jsonl(folder / f"{household.index:0{width}d}.jsonl", household.rows)
    _write_jsonl(directory / "eval.jsonl", make_evaluation(evaluation_size, seed))


def is_held_out(indices: Sequence[int]) -> bool:
    """Returns whether the combination of slot values at `indices` is held out for evaluation."""
    return sum(indices) % HOLD_OUT_EVERY == 0


def _rows(rng: random.Random, skills: Sequence[Skill], size: int, *, held_out: bool) -> list[Row]:
    """Returns `size` rows with distinct prompts, with the functions in turn, then shuffled."""
    functions = [(skill, function) for skill in skills for function in skill.functions]
    rng.shuffle(functions)
    rows: dict[str, Row] = {}
    for number in range(size):
        skill, function = functions[number % len(functions)]
        row = _new_row(rng, skill, function, rows, held_out=held_out)
        rows[row["prompt"]] = row
    return rng.sample(list(rows.values()), size)


def _new_row(rng: random.Random, skill: Skill, function: Function, taken: Container[str], *, held_out: bool) -> Row:
    for _ in range(DRAWS):
        indices = function.draw(rng)
        if is_held_out(indices) is not held_out:
            continue
        values = function.values_at(indices)
        prompt = format_prompt(function.request(rng.choice(function.phrasings), values))
        if prompt not in taken:
            return {"prompt": prompt, "completion": function.call(values), "skill": skill.name}
    raise ValueError(f"no new request for {function.name} in {DRAWS} draws: ask for fewer rows")


def _deal_skills(rng: random.Random) -> Iterator[Skill]:
    while True:
        yield from rng.sample(FEDERATED_SKILLS, len(FEDERATED_SKILLS))


def _distinct(deal: Iterator[Skill], count: int) -> list[Skill]:
    """Returns the next `count` different skills; repetitions at the border of two decks are skipped."""
    owned: dict[str, Skill] = {}
    while len(owned) < count:
        skill = next(deal)
        owned[skill.name] = skill
    return list(owned.values())


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
