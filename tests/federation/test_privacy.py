"""Federations with differential privacy: the words that devices send, who takes part how often, and the statement."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from federation_helpers import SECURE, Simulate

from fedtune.core.errors import JobError
from fedtune.core.job.job_file import load_job
from fedtune.core.privacy.budget import certainly_noised, epsilon_after, rho_of_round
from fedtune.server.run_directory import read_rounds

PRIVATE = (
    *SECURE,
    "federation.clients_per_round=3",
    "secure_aggregation.max_dropout=0.0",
    "privacy.mode=distributed",
    "privacy.epsilon=50",
    "privacy.delta=1e-3",
)


@pytest.mark.parametrize("mode", ["distributed", "central"])
def test_a_run_states_what_its_clients_have_spent_and_repeats(simulate: Simulate, tmp_path: Path, mode: str) -> None:
    job = (*PRIVATE, f"privacy.mode={mode}")
    summary = simulate(*job)
    privacy = summary["privacy"]
    assert privacy["participations"] == privacy["allowed_participations"] == 1
    assert privacy["epsilon"] == pytest.approx(50.0)
    lines = read_rounds(tmp_path / "run")
    assert Counter(client["id"] for line in lines for client in line["clients"]).most_common(1)[0][1] == 1
    assert all(line["train_loss"] is None or mode == "central" for line in lines)
    assert simulate(*job, name="again")["adapter_digest"] == summary["adapter_digest"]


def test_clients_that_took_part_less_often_come_first(simulate: Simulate, tmp_path: Path) -> None:
    simulate(*PRIVATE, "federation.rounds=4", "privacy.participations=2")
    lines = read_rounds(tmp_path / "run")
    asked = [{client["id"] for client in line["clients"]} for line in lines]
    assert asked[0] | asked[1] == asked[2] | asked[3]
    assert all(len(each) == 3 for each in asked)


def test_the_budget_is_shared_by_the_rounds_of_a_client() -> None:
    settings = load_job(None, [*PRIVATE, "privacy.participations=4"]).privacy
    assert epsilon_after(settings, 4) == pytest.approx(50.0)
    assert epsilon_after(settings, 1) < 50.0 / 2
    assert rho_of_round(load_job(None, list(SECURE)).privacy) == 0.0


@pytest.mark.parametrize(("clients", "noised"), [(10, 6), (100, 60), (5, 3)])
def test_only_clients_that_must_survive_and_do_not_collude_count_for_noise(clients: int, noised: int) -> None:
    job = load_job(None, ["privacy.mode=distributed"])
    assert certainly_noised(job, clients) == noised
    assert certainly_noised(load_job(None, ["privacy.mode=central"]), clients) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("secure_aggregation.enabled=false", "would see each update with a small share of the noise"),
        ("training.local_epochs=1", "training.local_epochs is set: the clip follows from the number of steps"),
        ("adapter.tiers=[16, 32, 40]", "its noise is for sums over all clients"),
        ("federation.evaluate_clients_every=1", "scores are a client's data without noise"),
    ],
)
def test_a_job_that_cannot_keep_its_guarantee_is_refused(override: str, words: str) -> None:
    settings = ["privacy.mode=distributed", override]
    if "local_epochs" in override:
        settings.append("training.local_steps=")
    with pytest.raises(JobError, match=words):
        load_job(None, settings)
