"""The summary and messages at a run's end."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.core.job.settings import Job
from fedtune.server.run_rounds import secure_summary


@pytest.mark.parametrize(
    ("evaluations", "shown"),
    [
        ([], False),
        ([{"id": "a", "eval": None}], False),
        ([{"id": "a", "eval": None}, {"id": "b", "eval": {"loss": 1.0}}], True),
    ],
)
def test_scores_count_as_seen_only_where_some_client_gave_one(evaluations: list[Any], shown: bool) -> None:
    line = {"secure": {"summed": 3, "minimum": 3, "threshold": 2}, "client_evaluations": evaluations}
    assert secure_summary(Job(), [line])["evaluations_shown"] is shown
