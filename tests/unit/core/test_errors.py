"""Errors cross from one process to another without loss."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from fedtune.core.errors import DataError, FedtuneError, JobError, MissingExtraError, UpdateError


@pytest.mark.parametrize(
    "error",
    [
        DataError(Path("a.jsonl"), "no object", 3),
        JobError(["one", "two"], Path("job.toml")),
        MissingExtraError("this", "client", "torch"),
        UpdateError("the loss is nan"),
    ],
)
def test_an_error_is_the_same_after_pickling(error: FedtuneError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
