"""The costs of whole federations: what a run records, and the budgets that end it."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation_helpers import FinishedRun, Simulate, run, small_job

from fedtune.server.run_directory import read_rounds, read_summary
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import resume


def test_a_run_records_the_work_of_its_rounds(whole: FinishedRun) -> None:
    costs, lines = whole.summary["costs"], read_rounds(whole.path)
    assert costs["total"]["flops"] == pytest.approx(sum(part["flops"] for line in lines for part in line["work"]))
    assert costs["total"]["seconds"] == pytest.approx(whole.summary["seconds"], rel=0.05)
    assert costs["total"]["up"] == whole.summary["bytes"]["up"]
    assert all(costs["purposes"][purpose]["flops"] > 0 for purpose in ("training", "evaluation"))
    assert whole.summary["ended"] is None


def test_a_budget_ends_a_run_before_its_last_round_and_a_resumed_one_at_once(
    tmp_path: Path, simulate: Simulate
) -> None:
    one = simulate("federation.rounds=1", "data.holdout=0", "federation.evaluate_every=0", name="one")["bytes"]["total"]
    path = tmp_path / "limited"
    keys = ("data.holdout=0", "federation.evaluate_every=0", f"budget.bytes={int(2.5 * one)}", "cost.watts=50")
    summary = run(small_job(*keys), path)
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    moved = summary["bytes"]["total"]
    assert summary["ended"] == f"budget.bytes = {int(2.5 * one):,} is spent: {moved:,} after 2 rounds"
    assert summary["eval_after"]["loss"] < 10  # scored at its end, though no round was
    assert summary["costs"]["total"]["joules"] == pytest.approx(50 * summary["costs"]["total"]["seconds"])
    again = resume(path, Silent())
    assert (again["rounds"], again["adapter_digest"]) == (2, summary["adapter_digest"])
    assert read_summary(path)["ended"] == summary["ended"]
