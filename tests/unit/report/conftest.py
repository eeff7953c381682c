"""Fixtures of run directories like those of real runs, without a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.job.job_file import dump_job
from fedtune.core.job.settings import Job
from fedtune.core.ledger import Ledger
from fedtune.core.round_records import ClientEvaluation, ClientRecord, Evaluation, RoundRecord
from fedtune.server.run_rounds import secure_summary, tier_summary

ADAPTER_PARAMETERS = 220_000
SENT = Ledger().sent("adapter", ADAPTER_PARAMETERS)
EVALUATED = 200

MakeRun = Callable[..., Path]


def evaluation(progress: float) -> Evaluation:
    """Returns a plausible score for a progress from 0 (untrained) to 1 (fully trained)."""
    return Evaluation(2.6 * math.exp(-3 * progress) + 0.1, 0.95 * progress**1.5, EVALUATED, 12 * EVALUATED)


@pytest.fixture(scope="session")
def run_writer() -> MakeRun:
    """Gives `write_run` to fixtures that outlive one test."""
    return write_run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Gives make_run(...), which writes a run directory and returns its path; see `write_run`."""

    def make(name: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / name, **options)

    return make


def write_run(
    path: Path,
    clients: Sequence[str] = ("ada", "ben", "cho"),
    rounds: int = 3,
    cohort: int | None = None,
    dropout: Callable[[int, str], str | None] = lambda _number, _name: None,
    aborted: Sequence[int] = (),
    evaluated: bool = True,
    finished: bool = True,
    answers: Sequence[dict[str, str]] = (),
    reported_loss: Callable[[str, float], float] = lambda _name, loss: loss,
) -> Path:
    """Writes job.toml, rounds.jsonl and, if finished, summary.json.

    Args:
        cohort: clients asked each round; all by default.
        dropout: (round, client) -> the reason for which it drops out.
        reported_loss: (client, true loss) -> the loss that the client reports.
    """
    chance = random.Random(0)
    path.mkdir(parents=True)
    (path / "job.toml").write_text(f"# base_digest = {'b' * 64}\n\n{dump_job(Job())}", encoding="utf-8")
    lines = []
    for number in range(1, rounds + 1):
        asked = sorted(chance.sample(list(clients), cohort or len(clients)))
        lines.append(
            _round(number, number / rounds, asked, dropout, number in aborted, evaluated, reported_loss, chance)
        )
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if finished:
        summary = _summary(lines, len(clients), evaluated, answers)
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path


def _round(
    number: int,
    progress: float,
    asked: Sequence[str],
    dropout: Callable[[int, str], str | None],
    aborted: bool,
    evaluated: bool,
    reported_loss: Callable[[str, float], float],
    chance: random.Random,
) -> dict[str, Any]:
    records, clock = [], 0.0
    for name in asked:
        reason = dropout(number, name)
        seconds = chance.uniform(0.3, 0.7)
        loss = 2.5 * math.exp(-2.5 * progress) + chance.gauss(0.25, 0.06)
        clock += seconds
        if reason is None:
            records.append(
                ClientRecord(
                    name,
                    tier=16,
                    rank=16,
                    examples=80,
                    tokens=960,
                    loss=reported_loss(name, loss),
                    seconds=seconds,
                    answered=clock,
                    traffic=SENT.received("update", ADAPTER_PARAMETERS // 2),
                )
            )
        else:
            records.append(ClientRecord(name, 16, 16, answered=clock, traffic=SENT, dropped=reason))
    losses = [record.loss for record in records if record.loss is not None]
    held_out = [
        ClientEvaluation(
            name,
            Evaluation(0.5, min(max(0.9 * progress + chance.gauss(0, 0.07), 0), 1), 20, 240),
            Ledger().received("evaluation", 90).sent("evaluation", 1000),
        )
        for name in asked
    ]
    return RoundRecord(
        round=number,
        seconds=clock + 0.05,
        factors="b",
        learning_rate=2e-3,
        clients=tuple(records),
        train_loss=sum(losses) / len(losses) if losses else None,
        aborted="1 of 10 clients survived; at least 2 must" if aborted else None,
        eval=evaluation(progress) if evaluated else None,
        client_evaluations=tuple(held_out) if evaluated else (),
    ).to_json()


def _summary(
    lines: Sequence[dict[str, Any]], population: int, evaluated: bool, answers: Sequence[dict[str, str]]
) -> dict[str, Any]:
    up, down = (sum(line["bytes"][way] for line in lines) for way in ("up", "down"))
    baseline = 4 * ADAPTER_PARAMETERS * sum(len(line["cohort"]) + len(line["survivors"]) for line in lines)
    return {
        "status": "finished",
        "rounds": len(lines),
        "clients": population,
        "eval_before": evaluation(0.05).to_json() if evaluated else None,
        "eval_after": lines[-1]["eval"] if lines else None,
        "client_evaluation": None,
        "bytes": {"up": up, "down": down, "total": up + down},
        "traffic": sum((Ledger.from_json(line["traffic"]) for line in lines), Ledger()).to_json(),
        "secure_aggregation": secure_summary(Job(), lines),
        "tiers": tier_summary(lines),
        "fp32_fedavg_bytes": baseline,
        "traffic_ratio": baseline / (up + down),
        "adapter_parameters": ADAPTER_PARAMETERS,
        "seconds": 61.5,
        "peak_rss_mb": 812.4,
        "versions": {"python": "3.11.2", "fedtune": "0.1.0"},
        "base_digest": "b" * 64,
        "adapter_digest": "a" * 64,
        "answers": list(answers),
        "paths": {},
    }
