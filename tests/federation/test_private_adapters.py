"""An audit of trained adapters: what they remember of single clients stays under what ε allows, and not without noise.

Every client plants a code among its requests; a coin decided which of two. The auditor, who knows both, takes the one
to which the finished adapter gives the smaller loss, measured against the base model's. Against an ε-private mechanism
each guess is right with a probability of at most e^ε/(1 + e^ε), as in Steinke, Nasr and Jagielski, "Privacy auditing
with one (1) training run" (2023), so that many right guesses refute a small ε. A client that changes its code changes
its update by up to two clips, so a mechanism of ρ for a client's presence has 4ρ for its code.

Without noise, the same codes are guessed.
"""

from __future__ import annotations

import json
import random
from contextlib import closing
from math import comb, exp
from pathlib import Path

import numpy as np
import pytest
from federation_helpers import without_pictures

from fedtune.core.codec import noised
from fedtune.core.job.job_file import load_job
from fedtune.core.privacy.guarantee import epsilon_of, largest_rho
from fedtune.data.examples import prepare
from fedtune.data.records import Record
from fedtune.demo import make_households
from fedtune.model.scoring import evaluate
from fedtune.server.preflight import check_simulation
from fedtune.server.run_directory import RunDirectory
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulated_run import open_context, run_job

CLIENTS, ROUNDS, COPIES, ORDINARY = 20, 10, 6, 4
PROMISED, DELTA, CONFIDENCE = 1.0, 1e-6, 0.95
JOB = (
    "adapter.rank=24",
    "data.holdout=0",
    "data.evaluation=",
    "data.sequence_length=64",
    f"federation.rounds={ROUNDS}",
    f"federation.clients_per_round={CLIENTS}",
    "training.batch_tokens=576",
    "training.local_steps=10",
    "training.schedule=constant",
    "secure_aggregation.max_dropout=0.0",
    "export.formats=[]",
    "privacy.mode=distributed",
    "privacy.clip=1.0",  # so that as much of an update is kept as can be
    f"privacy.delta={DELTA}",
    f"privacy.epsilon={epsilon_of(largest_rho(PROMISED, DELTA) / 4, DELTA)!r}",
    f"privacy.participations={ROUNDS}",
)


def planted(client: int, code: int, copy: int) -> Record:
    """Returns an example that holds one of a client's two codes."""
    digits = random.Random(f"{client} {code}").randrange(10**6)
    return Record(f'{{"call":"safe.open","code":{digits:06d}}}', f"open safe {client} of {copy} =>")


def write_clients(folder: Path, coins: list[int]) -> None:
    folder.mkdir()
    for client, (household, coin) in enumerate(zip(make_households(CLIENTS, 0, ORDINARY), coins, strict=True)):
        records = [Record(row["completion"], row["prompt"]) for row in household.rows]
        records += [planted(client, coin, copy) for copy in range(COPIES)]
        rows = [{"prompt": record.prompt, "completion": record.completion} for record in records]
        (folder / f"{client:02d}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def right_guesses(folder: Path) -> int:
    """Runs the federation, and returns how many clients' codes its adapter tells."""
    coins = [random.Random(f"coin {client}").randrange(2) for client in range(CLIENTS)]
    write_clients(folder, coins)
    job = load_job(None, [*JOB, f"data.train={folder}/*.jsonl"])
    path = folder / "run"
    with without_pictures():
        context = open_context(check_simulation(job), path, Silent())
        with closing(RunDirectory.create(path, job, context.base.digest)) as directory:
            run_job(context, directory, Silent())
            checkpoint = directory.restore()
    assert checkpoint is not None
    model, losses = context.model, []
    for adapter in (np.zeros(model.layout.size, np.float32), checkpoint.state.adapter):
        model.load(adapter)
        for client in range(CLIENTS):
            for code in range(2):
                examples, _ = prepare([planted(client, code, 0)], model.base.tokenizer, 64)
                losses.append(evaluate(model, examples).loss)
    before, after = np.array(losses).reshape(2, CLIENTS, 2)
    return int(((after - before).argmin(axis=1) == coins).sum())


def refuted(right: int) -> float:
    """Returns the largest ε that so many right guesses refute; 0 where they refute none."""

    def chance(epsilon: float) -> float:
        each = exp(epsilon) / (1 + exp(epsilon))
        return sum(
            comb(CLIENTS, count) * each**count * (1 - each) ** (CLIENTS - count) for count in range(right, CLIENTS + 1)
        )

    return max((epsilon for epsilon in np.arange(0.0, 6.0, 0.01) if chance(epsilon) <= 1 - CONFIDENCE), default=0.0)


@pytest.mark.slow
def test_what_an_adapter_remembers_of_a_client_stays_under_epsilon_and_is_plain_without_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = right_guesses(tmp_path / "private")
    print(f"{private} of {CLIENTS} codes are guessed, which refutes ε <= {refuted(private):.2f}; promised {PROMISED}")
    assert refuted(private) <= PROMISED
    monkeypatch.setattr(noised, "discrete_gaussian", lambda variance, count, stream: np.zeros(count, np.int64))
    plain = right_guesses(tmp_path / "plain")
    print(f"without noise {plain} of {CLIENTS}, which refutes ε <= {refuted(plain):.2f}")
    assert refuted(plain) > PROMISED
