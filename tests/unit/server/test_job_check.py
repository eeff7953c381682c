"""`fedtune check`: every mistake with its place, lengths in tokens, and what a run would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.server import cli

HEAD = '[model]\nbase = "demo"\n[data]\ntrain = "clients/*.jsonl"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gives a folder with a job and the data of ten clients, of whose records the tenth's are long."""
    (tmp_path / "clients").mkdir()
    for client in range(10):
        words = 60 if client == 9 else 3
        asked = "water the fern " * words
        rows = [{"prompt": f"{asked}{row} liters", "completion": f" {row}"} for row in range(12 + client)]
        (tmp_path / "clients" / f"{client}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "job.toml").write_text(f"{HEAD}sequence_length = 64\n[training]\nlocal_steps = 2\n")
    return tmp_path


def check(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", str(folder / "job.toml"), *arguments])
    return int(caught.value.code or 0), capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> dict[str, Any]:
    _, printed = check(capsys, folder, "--json", *(word for text in overrides for word in ("--set", text)))
    found: dict[str, Any] = json.loads(printed)
    return found


def test_a_job_that_can_run_is_described(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    status, text = check(capsys, folder)
    assert status == 0
    for part in (
        "clients      10, records 165 (12 to 21 a client, median 17): 0 12, 1 13",
        "21 cut at the beginning of the prompt",
        "would cut nothing",
        "scores from  examples that clients keep back (data.holdout = 0.1",
        "one client   ",
        "training of 10, ",
        f"next: fedtune simulate {folder / 'job.toml'}",
    ):
        assert part in text


def test_what_would_be_cut_and_needed_is_in_the_json(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = as_json(capsys, folder, "data.sequence_length=1024")
    assert (found["can_run"], found["problems"], found["bad_lines"]) == (True, [], [])
    assert found["clients"]["9"] == 21
    assert found["tokens"]["cleaning"]["truncated"] == 0
    assert 64 < found["tokens"]["longest"] < 1024
    predicted = found["predicted"]
    assert predicted["seconds"] == pytest.approx(20 * predicted["seconds_per_round"])
    assert predicted["client"]["predicted"]["peak"] > 0
    assert any("data.sequence_length = 1024; usual is at most" in warning for warning in found["warnings"])


def test_every_bad_line_of_every_file_is_named_and_the_list_is_bounded(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "clients" / "3.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"question": "a"}\n')
    (folder / "eval.jsonl").write_text("no JSON\n" * 30 + '{"text": "a"}\n')
    status, text = check(capsys, folder, "--set", "data.evaluation=eval.jsonl")
    assert status == 1
    assert f"{folder / 'clients' / '3.jsonl'}:2: has the keys question; expected" in text
    assert f"{folder / 'eval.jsonl'}:19: is not JSON" in text
    assert f"{folder / 'eval.jsonl'}:20:" not in text
    assert "… and 11 more" in text
    assert "number of lines that are no record: 31; correct them, or set data.skip_bad = true" in text
    assert "records 151" in text
    assert len(as_json(capsys, folder, "data.evaluation=eval.jsonl")["bad_lines"]) == 31


def test_bad_lines_that_the_job_skips_are_named_and_do_not_keep_it_from_running(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "clients" / "3.jsonl").write_text('{"prompt": "a", "completion": "b"}\nno JSON\n')
    found = as_json(capsys, folder, "data.skip_bad=true")
    assert (found["can_run"], len(found["bad_lines"])) == (True, 1)


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["model.base=/nowhere", "data.evaluation=none.jsonl"], ["/nowhere: not a directory", "none.jsonl: cannot be"]),
        (["data.colour=x", "federation.rounds=0"], ["data.colour: unknown key", "federation.rounds: expected"]),
        (["federation.clients_per_round=1"], ["clients_per_round, or set secure_aggregation.enabled = false"]),
        (["federation.selection=deadline"], ["simulation.fleet names no fleet"]),
        (["data.partition=by-field:topic"], ['record 1 has no such field']),
        (["privacy.mode=distributed", "federation.rounds=20"], ["privacy.participations"]),
        (["adapter.rank=300"], ["adapter.rank is 300, but"]),
        (["data.sequence_length=8", "data.train=clients/9.jsonl", "data.evaluation=long.jsonl"], ["no usable example"]),
    ],
)  # fmt: skip
def test_all_reasons_why_a_job_cannot_run_are_given(
    capsys: pytest.CaptureFixture[str], folder: Path, overrides: list[str], problems: list[str]
) -> None:
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "water the fern " * 20}) + "\n")
    extra = ["secure_aggregation.enabled=false"] if "clients/9" in " ".join(overrides) else []
    found = as_json(capsys, folder, *overrides, *extra)
    assert not found["can_run"]
    assert len(found["problems"]) == len(problems), found["problems"]
    for problem, part in zip(found["problems"], problems, strict=True):
        assert part in problem
