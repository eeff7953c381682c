"""The skills of the device assistant: functions, the phrasings of requests for them, and the call that answers each.

A request names every slot value in plain words; the answer is one line of JSON with the function and its arguments:

    warm the oven to 180 degrees for 20 minutes =>
    {"call":"kitchen.preheat","degrees":180,"minutes":20}

The base model has learned `public_skills` in pretraining. It has never seen `federated_skills`; the demo teaches them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

SEPARATOR = " =>"
"""The end of every prompt. It is part of the prompt's text, so that prompt and completion are tokenised separately."""

Value = str | int


@dataclass(frozen=True)
class Slot:
    """One argument of a call: its JSON key and the values that a request may name."""

    key: str
    values: Sequence[Value]


@dataclass(frozen=True)
class Function:
    """One function of a device.

    Args:
        name: `device.action`, the value of "call" in the answer.
        slots: arguments, in the order in which the answer lists them.
        phrasings: format strings over the slots' keys, each naming every slot.
    """

    name: str
    slots: tuple[Slot, ...]
    phrasings: tuple[str, ...]

    @property
    def combinations(self) -> int:
        """The number of distinct answers of this function."""
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
    """A device and its functions; households own devices, so clients differ in their skills."""

    name: str
    functions: tuple[Function, ...]


def format_prompt(request: str) -> str:
    """Returns the prompt of a request: its words, then `SEPARATOR`.

    A training sequence is tokens(prompt) + tokens(completion) + end-of-sequence, without a beginning-of-sequence token.
    """
    return request + SEPARATOR


def skill(name: str, *functions: Function) -> Skill:
    """Returns a skill from its functions."""
    return Skill(name, functions)


def function(name: str, slots: dict[str, Sequence[Value]], *phrasings: str) -> Function:
    """Returns a function from its slots' values by key, and its phrasings."""
    return Function(name, tuple(Slot(key, values) for key, values in slots.items()), phrasings)
