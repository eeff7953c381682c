"""The metrics of generated answers against expected ones, computed by torchmetrics.

    token-f1    F1 of the words of both (SQuAD's: without case, punctuation and English articles), mean over examples
    rouge-l     F1 of the longest common subsequence of words, without case and punctuation, mean over examples

Rajpurkar et al. 2016; Lin 2004. Words are runs of letters and digits of any script.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fedtune.core.errors import MissingExtraError

_PERCENT = 100.0
_WORD = re.compile(r"\w+")


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
    pairs = enumerate(zip(answers, references, strict=True))
    said, expected = [], []
    for number, (answer, reference) in pairs:
        said.append({"prediction_text": answer, "id": str(number)})
        expected.append({"answers": {"answer_start": [0], "text": [reference]}, "id": str(number)})
    return float(text.squad(said, expected)["f1"]) / _PERCENT


def _rouge_l(text: Any, answers: Sequence[str], references: Sequence[str]) -> float:
    # The package's own tokenizer drops every letter outside of a to z.
    found = text.rouge_score(
        list(answers), list(references), rouge_keys="rougeL", normalizer=str.casefold, tokenizer=_WORD.findall
    )
    return float(found["rougeL_fmeasure"])


_SCORES: Mapping[str, Callable[[Any, Sequence[str], Sequence[str]], float]] = {
    "token-f1": _token_f1,
    "rouge-l": _rouge_l,
}
