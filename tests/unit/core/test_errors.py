"""Errors cross from one process to another without loss."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtune.core import errors
from fedtune.core.errors import DataError, FedtuneError, JobError, MissingExtraError, UpdateError


@dataclass
class Installed:
    """An installed package with pip's record of where it came from."""

    record: str | None

    def read_text(self, name: str) -> str | None:
        return self.record if name == "direct_url.json" else None


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            '{"url": "file:///my%20clones/fedtune", "dir_info": {"editable": true}}',
            "pip install -e '/my clones/fedtune[server]'",
        ),
        ('{"url": "file:///x/f.whl", "archive_info": {}}', "pip install 'fedtune[server] @ file:///x/f.whl'"),
        (None, "pip install 'fedtune[server]'"),
    ],
)
def test_a_missing_extra_is_installed_from_where_fedtune_came_from(
    monkeypatch: pytest.MonkeyPatch, record: str | None, line: str
) -> None:
    monkeypatch.setattr(errors, "distribution", lambda _: Installed(record))
    assert str(MissingExtraError("this", "server", "x")) == f"this needs the package x. Install it with: {line}"


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
