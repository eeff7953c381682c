"""Metrics of generated answers: their definitions, on text of several scripts."""

from __future__ import annotations

import pytest

from fedtune.server.answer_metrics import mean_score

METRICS = ("token-f1", "rouge-l")


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        ("token-f1", "The cat!", "cat sat", 2 * 1.0 * 0.5 / 1.5),
        ("token-f1", "", "cat", 0.0),
        ("token-f1", "Größe кот", "größe Кот", 1.0),
        ("rouge-l", "the cat sat on mat", "the cat on the mat", 2 * 0.8 * 0.8 / 1.6),
        ("rouge-l", "Größe, КОТ", "größe кот", 1.0),
        ("rouge-l", "mat the", "the mat", 0.5),
        ("rouge-l", "", "cat", 0.0),
        *((metric, "“foo”", "foo", 1.0) for metric in METRICS),
        *((metric, "की", "का", 0.0) for metric in METRICS),
        *((metric, "🙂", "🙂", 1.0) for metric in METRICS),
        *((metric, "🙂", "🙁", 0.0) for metric in METRICS),
        *((metric, "!!!", "???", 0.0) for metric in METRICS),
        *((metric, "...", "...", 1.0) for metric in METRICS),
    ],
)
def test_one_answer(metric: str, answer: str, reference: str, score: float) -> None:
    assert mean_score(metric, [answer], [reference]) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_mean_counts_every_example_once(metric: str) -> None:
    assert mean_score(metric, ["a dog", "x", "x"], ["a dog", "y", "y"]) == pytest.approx(1 / 3, abs=1e-6)
