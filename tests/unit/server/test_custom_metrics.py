"""Metrics of a user's own: their means, their names, and errors that show the example."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import InputError, RunError
from fedtune.server.custom_metrics import CustomMetrics

ASKED = (["one", "two"], ["a", "b"], ["a", "c"])


def returns(value: Any) -> CustomMetrics:
    return CustomMetrics({"mine": lambda prompt, expected, answer: value})


def test_a_metric_is_the_mean_over_examples_of_its_function() -> None:
    metrics = CustomMetrics(
        {
            "same": lambda prompt, expected, answer: expected == answer,
            "numpy": lambda prompt, expected, answer: np.float32(len(prompt)),
        }
    )
    assert metrics.means(*ASKED) == {"same": 0.5, "numpy": 3.0}
    assert not CustomMetrics({})
    assert CustomMetrics({}).means([], [], []) == {}


@pytest.mark.parametrize("value", [None, "1.0", float("nan"), float("inf"), {"f1": 1.0}, [1.0]])
def test_what_is_no_finite_number_is_refused_with_the_example(value: Any) -> None:
    expected = re.escape(f"metric mine returns {value!r}; expected a finite number; on prompt 'one', expected 'a'")
    with pytest.raises(RunError, match=expected):
        returns(value).means(*ASKED)
    with pytest.raises(InputError, match=expected):
        returns(value).try_once("one", "a")


def test_the_texts_of_a_message_are_cut() -> None:
    with pytest.raises(RunError, match="returns None") as caught:
        returns(None).means(["x" * 5000], ["y"], ["z"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["", "1st", "two words", "a" * 41, "naïve"])
def test_a_name_that_would_not_fit_everywhere_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected a letter, then letters"):
        CustomMetrics({name: lambda prompt, expected, answer: 1.0})


@pytest.mark.parametrize("name", ["loss", "rouge-l", "seconds"])
def test_the_name_of_another_figure_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="as another figure of a run"):
        CustomMetrics({name: lambda prompt, expected, answer: 1.0}, taken=["seconds"])


def test_a_metric_is_a_function() -> None:
    with pytest.raises(InputError, match="metric mine is 'meteor'; expected a function"):
        CustomMetrics({"mine": "meteor"})  # type: ignore[dict-item]
