"""Federations with differential privacy: the words that devices send, who takes part how often, and the statement."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from federation_helpers import SECURE, Simulate

from fedtune.core.errors import JobError, PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.round_terms import check_evaluation
from fedtune.core.privacy.budget import certainly_noised, epsilon_after, rho_of_round
from fedtune.core.protocol.messages import PROTOCOL_VERSION, Base, Downlink, EvaluateRequest
from fedtune.server.privacy_statement import guarantee
from fedtune.server.run_directory import read_rounds
from fedtune.strategies.cohorts.selection import Rationed, UniformSelection

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


def test_devices_of_different_rank_noise_the_slices_that_they_own(simulate: Simulate, tmp_path: Path) -> None:
    tiers = ("adapter.rank=8", "adapter.tiers=[4, 8]", "simulation.ranks=[4, 8]")
    job = (*PRIVATE, *tiers, "federation.clients_per_round=6", "privacy.participations=2", "federation.rounds=2")
    summary = simulate(*job)
    assert summary["privacy"]["epsilon"] == pytest.approx(50.0)
    ranks = [client["rank"] for line in read_rounds(tmp_path / "run") for client in line["clients"]]
    assert Counter(ranks) == {4: 6, 8: 6}
    assert simulate(*job, name="again")["adapter_digest"] == summary["adapter_digest"]


def test_clients_that_took_part_less_often_come_first(simulate: Simulate, tmp_path: Path) -> None:
    simulate(*PRIVATE, "federation.rounds=4", "privacy.participations=2")
    lines = read_rounds(tmp_path / "run")
    asked = [{client["id"] for client in line["clients"]} for line in lines]
    assert asked[0] | asked[1] == asked[2] | asked[3]
    assert all(len(each) == 3 for each in asked)


def test_a_share_of_the_clients_is_one_of_all_of_them_whoever_has_rounds_left() -> None:
    names, selection = [f"{index:03d}" for index in range(100)], Rationed(UniformSelection(0.1, 3), 2)
    asked: Counter[str] = Counter()
    for number in range(1, 21):
        cohort = selection.cohort(number, names)
        assert len(set(cohort)) == 10
        asked.update(cohort)
        selection = replace(selection, taken=Counter(asked))
    assert set(asked.values()) == {2}
    assert selection.cohort(21, names) == []


def test_a_job_with_more_rounds_than_its_clients_may_take_part_in_is_refused_before_it_trains(
    simulate: Simulate,
) -> None:
    with pytest.raises(JobError, match="4 rounds of 3 clients out of 6 need 2 of each; raise it, or lower"):
        simulate(*PRIVATE, "federation.rounds=4")


def test_a_job_whose_noise_does_not_fit_is_refused_before_it_trains(simulate: Simulate, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"a deviation of [0-9]+ grid steps .* allow a larger privacy\.epsilon"):
        simulate(*PRIVATE, "privacy.epsilon=0.001", "privacy.participations=9")
    assert not read_rounds(tmp_path / "run")


def test_no_client_scores_in_a_private_job_and_a_device_refuses_to(simulate: Simulate, tmp_path: Path) -> None:
    summary = simulate(*PRIVATE, "data.holdout=0.2")
    assert summary["client_evaluation"] is None
    assert all(not line["client_evaluations"] for line in read_rounds(tmp_path / "run"))
    assert "the guarantee is that of a live run" in guarantee(summary["privacy"])
    base = Base("demo", "0" * 64, "nf4", 40, 32.0, ("all-linear",), 256)
    terms = JobTerms(load_job(None, [*PRIVATE, "training.learning_rate=0.01"]), base)
    adapter = Downlink("", "0" * 64, (b"",))
    request = EvaluateRequest(PROTOCOL_VERSION, terms.seed, 1, base, terms.job.data.holdout, adapter)
    with pytest.raises(PeerError, match="scores have no noise"):
        check_evaluation(terms, request)


def test_the_budget_is_shared_by_the_rounds_of_a_client() -> None:
    settings = load_job(None, [*PRIVATE, "privacy.participations=4"]).privacy
    assert epsilon_after(settings, 4) == pytest.approx(50.0)
    assert epsilon_after(settings, 1) < 50.0 / 2
    assert rho_of_round(load_job(None, list(SECURE)).privacy) == 0.0


@pytest.mark.parametrize(("clients", "noised"), [(10, 6), (100, 60), (5, 3)])
def test_only_clients_that_must_survive_and_do_not_collude_count_for_noise(clients: int, noised: int) -> None:
    job = load_job(None, ["privacy.mode=distributed"])
    assert certainly_noised(job, (clients,)) == (noised,)
    assert certainly_noised(load_job(None, ["privacy.mode=central"]), (clients,)) == ()


@pytest.mark.parametrize(
    ("by_tier", "noised"),
    [
        ((10, 10), (12, 2)),  # 14 of 20 survive, 4 of each tier; two may collude, and all who vanish be of one tier
        ((4, 16), (12, 8)),
        ((6, 6, 8), (12, 6, 2)),
    ],
)
def test_a_slice_counts_on_the_noise_of_its_own_owners_alone(by_tier: tuple[int, ...], noised: tuple[int, ...]) -> None:
    job = load_job(None, ["privacy.mode=distributed"])
    assert certainly_noised(job, by_tier) == noised


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("secure_aggregation.enabled=false", "would see each update with a small share of the noise"),
        ("training.local_epochs=1", "training.local_epochs is set: the clip follows from the number of steps"),
        ("federation.evaluate_clients_every=1", "scores are a client's data without noise"),
    ],
)
def test_a_job_that_cannot_keep_its_guarantee_is_refused(override: str, words: str) -> None:
    settings = ["privacy.mode=distributed", override]
    if "local_epochs" in override:
        settings.append("training.local_steps=")
    with pytest.raises(JobError, match=words):
        load_job(None, settings)
