"""What the device assistant can be asked: functions, the ways people ask for them, and the one call that answers.

A request names every slot value in plain words; the answer is one line of JSON with the function and its arguments:

    warm the oven to 180 degrees for 20 minutes =>
    {"call":"kitchen.preheat","degrees":180,"minutes":20}

The base model learnt `public_skills` in pretraining; `federated_skills` is what it never saw and the demo teaches it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

SEPARATOR = " =>"
"""Ends every prompt. It stands inside the prompt's own text, so that prompt and completion can be tokenised apart."""

Value = str | int


@dataclass(frozen=True)
class Slot:
    """One argument of a call: its JSON key and the values a request may name."""

    key: str
    values: Sequence[Value]


@dataclass(frozen=True)
class Function:
    """One thing a device can do.

    Args:
        name: `device.action`, the value of "call" in the answer.
        slots: the arguments, in the order in which the answer lists them.
        phrasings: format strings over the slots' keys, each naming every slot.
    """

    name: str
    slots: tuple[Slot, ...]
    phrasings: tuple[str, ...]

    @property
    def combinations(self) -> int:
        """How many different answers this function has."""
        return math.prod(len(slot.values) for slot in self.slots)

    def call(self, values: Sequence[Value]) -> str:
        """Returns the answer as compact JSON: the function first, then the slots in order."""
        arguments = {slot.key: value for slot, value in zip(self.slots, values, strict=True)}
        return json.dumps({"call": self.name, **arguments}, separators=(",", ":"))

    def request(self, phrasing: str, values: Sequence[Value]) -> str:
        """Returns the request in words, without the separator."""
        return phrasing.format(**{slot.key: value for slot, value in zip(self.slots, values, strict=True)})

    def draw(self, rng: random.Random) -> tuple[int, ...]:
        """Returns one index per slot, uniform over all combinations."""
        return tuple(rng.randrange(len(slot.values)) for slot in self.slots)

    def values_at(self, indices: Sequence[int]) -> tuple[Value, ...]:
        """Returns the slot values that `indices` (one per slot) point at."""
        return tuple(slot.values[index] for slot, index in zip(self.slots, indices, strict=True))


@dataclass(frozen=True)
class Skill:
    """A device and what it can do; households own devices, so this is the unit in which clients differ."""

    name: str
    functions: tuple[Function, ...]


def format_prompt(request: str) -> str:
    """Returns a request in words -> the prompt as the model reads it: request, then `SEPARATOR`.

    A training sequence is tokens(prompt) + tokens(completion) + end-of-sequence, without a beginning-of-sequence token.
    """
    return request + SEPARATOR


def skill(name: str, *functions: Function) -> Skill:
    """Returns a skill from its functions."""
    return Skill(name, functions)


def function(name: str, slots: dict[str, Sequence[Value]], *phrasings: str) -> Function:
    """Returns a function from its slots' values by key, and its phrasings."""
    return Function(name, tuple(Slot(key, values) for key, values in slots.items()), phrasings)
