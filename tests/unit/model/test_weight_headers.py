"""The headers of a base's weight files tell its linear layers as the network has them, or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.core.errors import ModelError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import ModelSettings
from fedtune.model.shape import shape_of
from fedtune.model.weight_headers import linear_layers
from fedtune.server.preflight import check_simulation

MakeModel = Callable[..., Path]


@pytest.mark.parametrize("architecture", ["gemma", "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_they_are_the_layers_of_the_network(make_model: MakeModel, architecture: str) -> None:
    directory = make_model(architecture)
    found = linear_layers(directory)
    assert found is not None
    assert set(found) == set(shape_of(ModelSettings(str(directory))).linear)


def test_other_architectures_and_files_that_are_broken_tell_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    assert linear_layers(tmp_path) is None
    copied = tmp_path / "model"
    shutil.copytree(make_model("llama"), copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert linear_layers(copied) is None
    (copied / "config.json").write_text(json.dumps(config))
    assert linear_layers(copied)
    (copied / "model.safetensors").write_bytes(b"\xff" * 64)
    assert linear_layers(copied) is None
    (copied / "config.json").write_text("[]")
    assert linear_layers(copied) is None


@pytest.mark.parametrize(
    ("setting", "refusal"),
    [
        ("adapter.rank=900", "adapter.rank is 900, but .* expected at most"),
        ('adapter.target_modules=["q_prj"]', "q_prj matches no linear layer of the base model; it has"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_torch_is_needed(setting: str, refusal: str) -> None:
    with pytest.raises(ModelError, match=refusal):
        check_simulation(load_job(None, [setting]))
