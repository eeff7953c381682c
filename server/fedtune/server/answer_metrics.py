"""The metrics of generated answers against expected ones, computed by torchmetrics.

    token-f1    F1 of the words of both, in any order (SQuAD's: without English articles), mean over examples
    rouge-l     F1 of the longest common subsequence of words, mean over examples

Rajpurkar et al. 2016; Lin 2004. Case and punctuation do not count. Words are runs of letters, marks and digits, so in
scripts without spaces whole phrases. Where a text has none, its signs are its words: emoji are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unicodedata import category

from fedtune.core.errors import MissingExtraError

_PERCENT = 100.0


def require_metrics(metric: str) -> None:
    """Checks that the package which computes a metric is there.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("torchmetrics") is None:
        raise MissingExtraError(f'evaluation.metric = "{metric}"', "server", "torchmetrics")


def mean_score(metric: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns the mean of a metric over examples, between 0 and 1.

    Args:
        metric: "token-f1" or "rouge-l".
        answers: generated answers.
        references: the expected answer to each.
    """
    return _SCORES[metric](import_module("torchmetrics.functional.text"), answers, references)


def _token_f1(text: Any, answers: Sequence[str], references: Sequence[str]) -> float:
    said, expected = [], []
    for number, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        said.append({"prediction_text": " ".join(_words(answer)), "id": str(number)})
        right = {"answer_start": [0], "text": [" ".join(_words(reference))]}
        expected.append({"answers": right, "id": str(number)})
    return float(text.squad(said, expected)["f1"]) / _PERCENT


def _rouge_l(text: Any, answers: Sequence[str], references: Sequence[str]) -> float:
    # The package's own tokenizer drops every letter outside of a to z.
    found = text.rouge_score(
        list(answers), list(references), rouge_keys="rougeL", normalizer=str.casefold, tokenizer=_words
    )
    return float(found["rougeL_fmeasure"])


def _words(text: str) -> list[str]:
    """Returns the words of a text, or where it has none, a name for each of its signs."""
    letters = "".join(sign if sign.isalnum() or category(sign).startswith("M") else " " for sign in text.casefold())
    return letters.split() or [f"sign{ord(sign):x}" for sign in text if not sign.isspace()]


_SCORES: Mapping[str, Callable[[Any, Sequence[str], Sequence[str]], float]] = {
    "token-f1": _token_f1,
    "rouge-l": _rouge_l,
}
