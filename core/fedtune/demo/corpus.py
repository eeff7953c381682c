"""The pretraining corpus of the base model: free text, copying, and public skills in the call format.

This module generates all text from `vocabulary` and `PUBLIC_SKILLS`. It contains no federated function and no text of
other authors.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fedtune.demo import vocabulary as words
from fedtune.demo.public_skills import PUBLIC_SKILLS
from fedtune.demo.skills import format_prompt

PUBLIC_CALL_SHARE = 0.6
COPY_SHARE = 0.3
"""Shares of documents; the rest is free text."""
NUMBER_SHARE = 0.7
"""Share of numbers among the copied items; they are the hardest to copy, digit by digit."""


@dataclass(frozen=True)
class Document:
    """One pretraining sequence: a prompt and its completion. Free text has an empty prompt."""

    prompt: str
    completion: str


def draw_document(rng: random.Random) -> Document:
    """Returns one document of the mixture."""
    kind = rng.random()
    if kind < PUBLIC_CALL_SHARE:
        return public_call(rng)
    if kind < PUBLIC_CALL_SHARE + COPY_SHARE:
        return _copying(rng)
    return _free_text(rng)


_PUBLIC_FUNCTIONS = [function for skill in PUBLIC_SKILLS for function in skill.functions]


def public_call(rng: random.Random) -> Document:
    """Returns a request to a public function, and its call."""
    function = rng.choice(_PUBLIC_FUNCTIONS)
    values = function.values_at(function.draw(rng))
    return Document(format_prompt(function.request(rng.choice(function.phrasings), values)), function.call(values))


_COPIED_WORDS = words.NOUNS + words.HOUSE_WORDS


def _copying(rng: random.Random) -> Document:
    """Returns words and numbers, then the same ones as a JSON list, which teaches to copy arguments without a skill."""
    items: list[str | int] = [
        _number(rng) if rng.random() < NUMBER_SHARE else rng.choice(_COPIED_WORDS) for _ in range(rng.randint(2, 6))
    ]
    quoted = ",".join(str(item) if isinstance(item, int) else f'"{item}"' for item in items)
    return Document(format_prompt("copy " + " ".join(str(item) for item in items)), f"[{quoted}]")


def _number(rng: random.Random) -> int | str:
    return rng.choice(words.TIMES) if rng.random() < 0.3 else rng.randrange(10 ** rng.randint(1, 5))


_SENTENCES = (
    "the {a} is next to the {b} in the {room}",
    "{person} took the {a} to the {place} on {day} at {time}",
    "after {n} minutes the {a} was warm and the {b} was cold",
    "we bake bread in the oven for {n} minutes and drink {n} cups of {drink}",
    "the car drove to the {place} with new tires and a warm seat",
    "navigate the road to the {place} or take the train before {time}",
    "to preheat an oven is to warm it up before you bake and to thaw is to defrost what is frozen in ice",
    "{person} wears a watch that can track a workout and count {n} steps and feel the pulse",
    "a pulse under {n} is low and one over {n} is high so it may buzz to warn or alert {person}",
    "in the workshop a drill can bore a hole and a saw can cut or trim {material} to a width and depth",
    "the printer printed {n} copies of the {a} in {material} at full speed with many turns",
    "{plant} in the garden look dry so pour some liters of water and feed them compost or fertilizer",
    "mow the grass with the mower to a low height before the sun is up",
    "{person} likes to play {genre} music and hear it at a high volume from the speakers until they fade",
    "record or tape what is on the channel and save it from the start to the end",
    "the battery may charge when power is cheap and the price is {n} cents so the {appliance} uses few watts",
    "do not let the {appliance} draw over a limit and cap what it costs to run below {n}",
    "the doctor measured blood pressure and gave a dose of {medicine} for every day",
    "upper and lower pressure and hours of sleep are good to log and {person} slept and rested well",
    "{n} grams of {food} and {n} liters of water make a meal",
    "{person} does {sport} for {n} hours and then has {food} with {drink}",
    "the front and the rear of the {a} are made of {material}",
    "energy and health and media are things a house can help with and a wearable too",
    "climate and goal and device and object and sport and genre and medicine are words that {person} knows",
    "i would like to put some {food} out and stop when the {b} is ready by {time}",
    "hold the {a} behind the {b} and fill it when it should be full",
)


def _free_text(rng: random.Random) -> Document:
    draws = {
        "a": rng.choice(words.OBJECTS),
        "b": rng.choice(words.OBJECTS),
        "n": _number(rng),
        "room": rng.choice(words.ROOMS),
        "person": rng.choice(words.PEOPLE),
        "place": rng.choice(words.PLACES),
        "day": rng.choice(words.DAYS),
        "time": rng.choice(words.TIMES),
        "drink": rng.choice(words.DRINKS),
        "food": rng.choice(words.FOODS),
        "plant": rng.choice(words.PLANTS),
        "sport": rng.choice(words.SPORTS),
        "genre": rng.choice(words.GENRES),
        "material": rng.choice(words.MATERIALS),
        "appliance": rng.choice(words.APPLIANCES),
        "medicine": rng.choice(words.MEDICINES),
    }
    return Document("", rng.choice(_SENTENCES).format(**draws))
