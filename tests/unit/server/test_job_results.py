"""Logs that begin again when they are full, and copies of results that are whole or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.core.errors import RunDirectoryError
from fedtune.server.live.log_files import KEPT_FILES, logged, read_log
from fedtune.server.run_directory import file_digests
from fedtune.server.run_results import fetch_results


def stays() -> None:
    pytest.fail("it waits for lines, though the log is complete")


def texts(lines: Iterator[str]) -> list[str]:
    """Returns the lines without their times."""
    return [line[21:] for line in lines]


def test_a_log_has_the_time_of_each_line_and_keeps_the_last_of_many(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "job.log"
    with logged(path, size=500) as display:
        for number in range(200):
            display.note(f"line {number} [bold]as it is[/bold]")
    lines = list(read_log(path, lambda: True, stays))
    assert lines[-1][:4].isdigit()
    assert texts(iter(lines))[-1] == "line 199 [bold]as it is[/bold]"
    kept = [int(line.split()[1]) for line in texts(iter(lines))]
    assert kept == list(range(kept[0], 200))
    assert len(list(path.parent.iterdir())) == 1 + KEPT_FILES


def test_a_log_that_is_followed_loses_no_line_when_it_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    written = 0
    with logged(path, size=500) as display:

        def write() -> None:  # several files' worth between two looks
            nonlocal written
            for _ in range(23):
                display.note(f"line {written}")
                written += 1

        followed = texts(read_log(path, lambda: written > 400, write))
    assert followed == [f"line {number}" for number in range(written)]


def test_following_waits_for_a_log_that_does_not_exist_yet_and_ends_where_it_never_will(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    assert list(read_log(path, lambda: True, stays)) == []
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            path.write_text("2026-11-27 00:00:00  begins\n")

    assert texts(read_log(path, lambda: looks > 5, look)) == ["begins"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Gives a run directory that has results, as a run writes them."""
    run = tmp_path / "runs" / "first"
    for folder in ("adapter", "checkpoints"):
        (run / folder).mkdir(parents=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "rounds.jsonl").write_text("{}\n")
    (run / "job.toml").write_text("")
    (run / "report.html").write_text("<html></html>\n")
    files = file_digests(run, [*sorted((run / "adapter").iterdir()), run / "rounds.jsonl"])
    (run / "summary.json").write_text(json.dumps({"status": "finished", "files": files}))
    return run


def test_results_are_copied_whole_to_a_new_folder(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "results"
    copied = fetch_results(finished, out)
    assert {path.name for path in copied} == {"adapter", "report.html", "rounds.jsonl", "summary.json", "job.toml"}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in copied)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"
    with pytest.raises(RunDirectoryError, match="results: exists already; choose another --out"):
        fetch_results(finished, out)


def test_results_that_are_half_there_are_refused_with_every_reason_and_remedy(finished: Path, tmp_path: Path) -> None:
    (finished / "adapter" / "adapter_model.safetensors").write_bytes(b"weight")
    (finished / "rounds.jsonl").unlink()
    (finished / "report.html").write_text("<html>")
    (finished / "onnx" / "int4").mkdir(parents=True)
    (finished / "onnx" / "int4" / "fedtune.json").write_text("{}")
    with pytest.raises(RunDirectoryError) as refused:
        fetch_results(finished, tmp_path / "out")
    text = str(refused.value)
    assert "its results are not whole, and nothing was copied" in text
    assert "adapter/adapter_model.safetensors is changed; take it from a backup" in text
    assert "rounds.jsonl is missing" in text
    assert f"report.html is missing or cut off; write it again with: fedtune report {finished}" in text
    assert f"{finished}/onnx/int4/fedtune.json: not a manifest" in text
    assert f"export it again with: fedtune export {finished} --force" in text
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "nothing stays behind"


@pytest.mark.parametrize("left", ["", "{", '{"files": {"/etc/hostname": "0"}}', '{"files": 1}'])
def test_a_summary_that_is_missing_or_damaged_is_refused(finished: Path, tmp_path: Path, left: str) -> None:
    (finished / "summary.json").write_text(left)
    with pytest.raises(RunDirectoryError, match="not whole"):
        fetch_results(finished, tmp_path / "out")
    shutil.rmtree(finished / "adapter")
    (finished / "summary.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"its state: fedtune server show first"):
        fetch_results(finished, tmp_path / "out")
