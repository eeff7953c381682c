"""Metrics of a user's own, Python functions that score one generated answer each; a run has their means over examples.

    metrics = CustomMetrics({"valid_json": valid_json})     # valid_json(prompt, expected, answer) -> float
    metrics.means(prompts, references, answers)             # {"valid_json": 0.85}

The order is scikit-learn's: what is true comes before what was predicted. A run is still judged by evaluation.metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import SupportsFloat

from fedtune.core.errors import FedtuneError, InputError, RunError
from fedtune.core.metrics import METRICS

AnswerMetric = Callable[[str, str, str], SupportsFloat]
"""(prompt, expected answer, generated answer) -> a figure of this example, such as True, 0.25 or a numpy scalar."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_SHOWN = 200  # characters of each text that a message shows


class CustomMetrics:
    """Functions that score generated answers.

    Args:
        functions: name in the results -> function.
        taken: names of other figures beside which these are shown.

    Raises:
        InputError: a name cannot be used, or something is no function.
    """

    def __init__(self, functions: Mapping[str, AnswerMetric], taken: Collection[str] = ()) -> None:
        for name, function in functions.items():
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"a metric is named {name!r}; expected a letter, then letters, digits, dashes and underscores"
                )
            if name in METRICS or name in taken:
                raise InputError(f"a metric is named {name!r}, as another figure of a run; expected another name")
            if not callable(function):
                raise InputError(f"metric {name} is {function!r}; expected a function (prompt, expected, answer)")
        self._functions = dict(functions)

    def __bool__(self) -> bool:
        return bool(self._functions)

    def try_once(self, prompt: str, expected: str) -> None:
        """Calls every function once, with the expected answer as the generated one.

        Raises:
            InputError: a function fails, or returns no finite number.
        """
        for name in self._functions:
            self._score(name, prompt, expected, expected, InputError)

    def means(self, prompts: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """Returns every function's mean over examples.

        Args:
            references: the expected answer to each prompt.
            answers: the generated answer to each prompt.

        Raises:
            RunError: a function fails on an example, or returns no finite number; the message has the example.
        """
        asked = list(zip(prompts, references, answers, strict=True))
        return {
            name: math.fsum(self._score(name, *example, RunError) for example in asked) / len(asked)
            for name in self._functions
        }

    def _score(self, name: str, prompt: str, expected: str, answer: str, error: type[FedtuneError]) -> float:
        example = f"prompt {_short(prompt)}, expected {_short(expected)}, answer {_short(answer)}"
        try:
            value = self._functions[name](prompt, expected, answer)
            score = float(value) if isinstance(value, SupportsFloat) else math.nan
        except Exception as problem:  # it is the user's program and may raise anything
            raise error(f"metric {name} fails: {type(problem).__name__}: {problem}; on {example}") from problem
        if not math.isfinite(score):
            raise error(f"metric {name} returns {value!r}; expected a finite number; on {example}")
        return score


NO_METRICS = CustomMetrics({})


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
