"""The check of held-out examples against training examples: an evaluation on other data measures something else.

    for warning in mismatches(training, evaluation):
        display.note(warning)

It compares the form of the records, and whatever takes few values in training: short completions such as labels, and
further keys such as a category.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fedtune.data.records import Record

MAX_VALUES = 200  # distinct values of a closed set
REPEATS = 5  # mean number of records per value of a closed set
UNSEEN_SHARE = 0.02  # of evaluation records with values that training never has, up to which there is no warning
UNSEEN_DEVIATIONS = 3.0  # by which a small set of the same source may exceed that share
_REMEDY = "take held-out examples from the same source as data.train, or change data.evaluation"


def mismatches(training: Sequence[Record], evaluation: Sequence[Record]) -> list[str]:
    """Returns a sentence for each way in which evaluation records are unlike the training records.

    Args:
        training: all training records, or a sample of them.
        evaluation: the held-out records; none where the job has none.
    """
    if not training or not evaluation:
        return []
    forms = Counter(map(_form, training))
    strange = Counter(form for record in evaluation if (form := _form(record)) not in forms)
    warnings = []
    if strange:
        form, count = strange.most_common(1)[0]
        warnings.append(
            f"data.evaluation: {count:,} of {len(evaluation):,} records are {form}, and training has only "
            f"{' and '.join(sorted(forms))}; {_REMEDY}"
        )
    warnings += _unseen("completions", [r.completion for r in training], [r.completion for r in evaluation])
    shared = set.intersection(*(set(record.fields) for record in (*training, *evaluation)))
    for key in sorted(shared):
        known, asked = ([record.fields[key] for record in records] for records in (training, evaluation))
        if [value.strip() for value in known] != [record.completion.strip() for record in training]:
            warnings += _unseen(f'values of "{key}"', known, asked)
    return warnings


def _form(record: Record) -> str:
    if record.messages:
        return "conversations"
    return "prompts with completions" if record.prompt else "plain text"


def _unseen(named: str, training: Sequence[str], evaluation: Sequence[str]) -> list[str]:
    """Returns a warning if the values are a closed set in training, and evaluation has others."""
    known = Counter(value.strip() for value in training)
    asked = [value.strip() for value in evaluation]
    if len(known) > MAX_VALUES or known.total() < REPEATS * len(known):
        return []
    unseen = Counter(value for value in asked if value not in known)
    usual = UNSEEN_SHARE * len(asked)
    if unseen.total() <= usual + UNSEEN_DEVIATIONS * math.sqrt(usual):
        return []
    (example, _), *_ = unseen.most_common(1)
    problem = f"data.evaluation: {unseen.total():,} of {len(asked):,} records have {named} that training never has"
    return [f'{problem}, such as "{example[:60]}"; {_REMEDY}']
