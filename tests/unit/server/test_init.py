"""`fedtune init`: a job file that fits base and data, and that `fedtune check` has nothing against."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.data.job_inputs import JobInputs
from fedtune.server import cli
from fedtune.server.preflight import simulation_problems

Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def question(number: int, **fields: object) -> Row:
    return {"prompt": f"water the fern with {number} liters =>", "completion": f" {number}", **fields}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def init(*arguments: str, model: str = "demo") -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["init", "--model", model, *arguments])
    return int(caught.value.code or 0)


def proposed(*arguments: str, model: str = "demo") -> Job:
    assert init(*arguments, model=model) == 0
    job = load_job(Path("job.toml").absolute())
    assert list(simulation_problems(JobInputs(job))) == []
    return job


def test_files_are_clients_and_every_line_has_a_comment(tmp_path: Path) -> None:
    for client in range(12):
        write(tmp_path / "clients" / f"{client}.jsonl", [question(number) for number in range(30)])
    job = proposed("--data", "clients/*.jsonl")
    assert (job.data.partition, job.data.train) == ("by-file", str(tmp_path / "clients/*.jsonl"))
    assert (job.federation.clients_per_round, job.secure_aggregation.enabled) == (10, True)
    assert (job.data.sequence_length, job.data.evaluation) == (16, "")
    text = (tmp_path / "job.toml").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line and "#" not in line and not line.startswith("[")] == []


@pytest.mark.parametrize(
    ("fields", "arguments", "partition", "clients"),
    [
        (lambda number: {"user": f"u{number % 14}", "topic": number % 3}, (), "by-field:user", 14),
        (lambda number: {"user": f"u{number % 14}", "topic": number % 3}, ("--clients", "8"), "dirichlet:0.5:topic", 8),
        (lambda number: {"topic": number % 3}, (), "dirichlet:0.5:topic", 10),
        (lambda number: {"id": number}, (), "iid", 10),
        (lambda number: {"id": number}, ("--clients", "140"), "iid", 140),
        (lambda number: {"topic": "a" if number else "b"}, ("--clients", "140"), "iid", 140),
    ],
)
def test_records_are_dealt_by_what_their_fields_are(
    tmp_path: Path, fields: Callable[[int], Row], arguments: tuple[str, ...], partition: str, clients: int
) -> None:
    write(tmp_path / "all.jsonl", [question(number, **fields(number)) for number in range(140)])
    job = proposed("--data", "all.jsonl", *arguments)
    assert job.data.partition == partition
    assert len(JobInputs(job).population.names) == clients


def test_too_few_clients_for_a_secure_sum_train_in_the_clear_and_both_file_and_command_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for client in range(2):
        write(tmp_path / "clients" / f"{client}.jsonl", [question(number) for number in range(30)])
    job = proposed("--data", "clients/*.jsonl")
    assert not job.secure_aggregation.enabled
    assert "secure aggregation is off, so the server sees every update" in capsys.readouterr().out
    assert "a sum hides one from 3 clients a round on" in (tmp_path / "job.toml").read_text(encoding="utf-8")


def test_a_few_very_long_examples_do_not_decide_the_sequence_length(tmp_path: Path) -> None:
    rows = [question(number) for number in range(100)]
    write(tmp_path / "all.jsonl", [*rows, {"prompt": "fern " * 300, "completion": "1"}])
    assert proposed("--data", "all.jsonl").data.sequence_length == 16


def test_text_is_cut_into_pieces_no_longer_than_the_base_supports(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    write(tmp_path / "all.jsonl", [{"text": f"{number} " + "turn on the lamp " * 200} for number in range(20)])
    job = proposed("--data", "all.jsonl", model=str(make_model()))
    assert job.data.sequence_length == 256
    assert job.training.batch_tokens >= 256
    assert (job.adapter.kind, job.adapter.rank) == ("core", 32)  # its narrowest layer has 32 outputs


def test_without_the_bases_tokenizer_lengths_are_estimated(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [question(number) for number in range(40)])
    assert init("--data", "all.jsonl", model="no-such/base") == 0
    assert load_job(tmp_path / "job.toml").model.base == "no-such/base"
    assert "estimated as 3 characters each" in (tmp_path / "job.toml").read_text(encoding="utf-8")


def test_paths_start_at_the_jobs_folder(tmp_path: Path) -> None:
    write(tmp_path / "data" / "all.jsonl", [question(number) for number in range(40)])
    assert init("first", "--data", "data/all.jsonl") == 0
    table = tomllib.loads((tmp_path / "first" / "job.toml").read_text(encoding="utf-8"))
    assert table["data"]["train"] == "../data/all.jsonl"
    assert init("second.toml", "--data", str(tmp_path / "data" / "all.jsonl")) == 0
    assert load_job(tmp_path / "second.toml").data.train == str(tmp_path / "data" / "all.jsonl")


def test_bad_lines_are_counted_and_left_to_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "all.jsonl", [question(1), *({"question": "?"} for _ in range(3)), *map(question, range(40))])
    assert init("--data", "all.jsonl") == 0
    assert "lines among them that are no record: 3; the check names them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--data", "all.jsonl"), "job.toml: exists already; --force replaces it"),
        (("other", "--data", "none.jsonl"), "none.jsonl: no such file"),
        (("other", "--data", "broken.jsonl"), "broken.jsonl:1: is not JSON"),
        (("other", "--data", "all.jsonl", "--model", "/nowhere"), "/nowhere: not a directory"),
        (("other", "--data", "all.jsonl", "--clients", "41"), "data.clients is 41, but there are only 40 records"),
        (("all.jsonl", "--data", "all.jsonl"), "all.jsonl/job.toml: cannot be written: "),
    ],
)
def test_a_mistake_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    write(tmp_path / "all.jsonl", [question(number) for number in range(40)])
    (tmp_path / "broken.jsonl").write_text("no JSON\n", encoding="utf-8")
    (tmp_path / "job.toml").write_text("mine", encoding="utf-8")
    assert init(*arguments) == 2
    assert complaint in capsys.readouterr().err
    assert (tmp_path / "job.toml").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "other").exists()


def test_an_existing_file_is_replaced_by_force(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", [question(number) for number in range(40)])
    (tmp_path / "job.toml").write_text("mine", encoding="utf-8")
    assert proposed("--data", "all.jsonl", "--force").model.base == "demo"
