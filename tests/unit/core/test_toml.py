"""TOML files that resemble no job and no fleet are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.errors import JobError
from fedtune.core.job.device_kinds import load_fleet
from fedtune.core.job.job_file import load_job


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("a = " + "[" * 400 + "]" * 400, "nested too deep"),
        ("a" + ".a" * 5000 + " = 1", "nested too deep"),
        ("[" + "a." * 3000 + "a]", "nested too deep"),
        ("a = " + "9" * 5000, "not TOML"),
        ("a = \xff", "not TOML"),
    ],
)
def test_a_file_that_is_absurd_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode("latin-1"))
    for load in (load_job, load_fleet):
        with pytest.raises(JobError, match=reason):
            load(path)


def test_a_base_whose_name_is_too_long_for_a_path_is_a_hub_id(tmp_path: Path) -> None:
    path, name = tmp_path / "job.toml", "a/" * 5000
    path.write_text(f'[model]\nbase = "{name}"\n[data]\ntrain = "demo"\n')
    assert load_job(path).model.base == name
