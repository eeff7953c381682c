"""A run whose job asks for an export ends with models that answer its prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from federation_helpers import Simulate, go_on, run, small_job

from fedtune.core.errors import MissingExtraError
from fedtune.core.protocol.model_manifest import verify


def test_a_run_ends_with_the_export_that_its_job_asks_for(simulate: Simulate, tmp_path: Path) -> None:
    summary = simulate('export.formats=["fp32"]', "federation.rounds=1")
    (done,) = summary["exports"]
    assert verify(Path(done["path"])).provenance["adapter_digest"] == summary["adapter_digest"]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [answer["exported"] for answer in summary["answers"]] == [answer["after"] for answer in summary["answers"]]
    again = go_on(tmp_path / "run")
    assert [answer["exported"] for answer in again["answers"]] == [answer["after"] for answer in summary["answers"]]


def test_an_export_that_could_not_be_made_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnx" else real(name, *more))
    with pytest.raises(MissingExtraError, match=r"pip install .*\[export,inference\]"):
        run(small_job('export.formats=["int4"]'), tmp_path / "run")
    assert not (tmp_path / "run").exists()
