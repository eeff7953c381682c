"""A newcomer's first hours: three commands lead from own data and a base to a report with scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.server import cli


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def test_init_check_and_simulate_lead_from_data_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        f"the {plant} needs {litres} liters =>,water {litres},u{litres % 5}" for plant in "abcd" for litres in range(15)
    ]
    (tmp_path / "all.csv").write_text("\n".join(["prompt,completion,user", *rows]), encoding="utf-8")
    assert run("init", "--model", "demo", "--data", "all.csv") == 0
    assert run("check", "job.toml") == 0
    quick = ("--set", "federation.rounds=1", "--set", "training.local_steps=1", "--set", "simulation.workers=1")
    assert run("simulate", "job.toml", "--out", "run", *quick) == 0
    printed = capsys.readouterr().out
    assert printed.count("scores from") == 3  # the check, the beginning of the run, and its end
    assert "loss on the clients' own held-out data" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["scores_from"].startswith("examples that clients keep back")
    assert (summary["eval_before"], summary["clients"], summary["client_evaluation"]["examples"]) == (None, 5, 5)
    assert "On clients&#39; held-out data" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
