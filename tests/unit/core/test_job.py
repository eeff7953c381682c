"""The job file: defaults, overrides, and every mistake reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.errors import JobError
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.settings import Job


def write(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_job_is_the_demo() -> None:
    assert load_job(None) == Job()


def test_overrides_reach_their_section_and_keep_their_type(tmp_path: Path) -> None:
    path = write(tmp_path, '[data]\ntrain = "demo"\n[federation]\nrounds = 3\n')
    overrides = ["federation.rounds=7", "training.learning_rate=1e-4", "model.base=org/model", "data.skip_bad=true"]
    job = load_job(path, overrides)
    assert (job.federation.rounds, job.training.learning_rate, job.model.base) == (7, 1e-4, "org/model")
    assert job.data.skip_bad is True


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        colour = "red"
        [model]
        bass = "demo"
        [federation]
        rounds = "many"
        clients_per_round = 1.5
        [training]
        local_steps = 3
        local_epochs = 1
        [adapter]
        rank = 0
        """,
    )
    with pytest.raises(JobError) as caught:
        load_job(path, ["nonsense"])
    text = str(caught.value)
    for part in (
        "colour",
        "model.bass: unknown key; expected one of base, quantization",
        "federation.rounds",
        "federation.clients_per_round",
        "adapter.rank",
        "training.local_steps and training.local_epochs are both set",
        "--set nonsense: expected section.key=value",
    ):
        assert part in text
    assert all(line.startswith(str(path)) for line in text.splitlines())
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.batch_tokens=64", "less than one sequence"),
        ("data.partition=iid", "households are clients already"),
        ("federation.minimum_clients=11", "more than federation.clients_per_round"),
        ("simulation.workers=2 simulation.threads=0", "threads do not survive a fork"),
        ("compression.form=sparse compression.rotation=false", 'only compression.form = "ring" rotates'),
        ("compression.form=sparse compression.bits=1", 'form = "sparse" takes 2 to 8'),
        ("secure_aggregation.enabled=false compression.bits=1", 'form = "dense" takes 2 to 8'),
        ("compression.density=0.5", 'only compression.form = "sparse" leaves values out'),
        ("compression.error_feedback=true", 'compression.form is "ring": a residual carried into a later sum'),
        (
            "secure_aggregation.enabled=false compression.form=ring compression.error_feedback=true",
            "a device that takes part once never sends it",
        ),
        (
            "adapter.kind=core federation.aggregation=ffa",
            'but federation.aggregation is "ffa"; expected "fedavg"',
        ),
        ("adapter.kind=core federation.aggregation=fedrot", 'expected "fedavg"'),
        ("adapter.kind=core federation.rebalance_every=2", "no pair of trained factors to balance"),
        ("secure_aggregation.groups=4", "of 10 clients a round, a group would have 2, .* expected at most 3"),
        ("secure_aggregation.groups=3 federation.clients_per_round=0.5 secure_aggregation.enabled=false", "groups = 1"),
        ("secure_aggregation.groups=3 adapter.tiers=[8,40]", "no group would have enough clients of every tier"),
        ("secure_aggregation.groups=3 federation.selection=deadline", "may leave any group with too few"),
        ("federation.robust=median", "with secure_aggregation.groups of 3 or more"),
        ("federation.robust=median secure_aggregation.groups=2", "with secure_aggregation.groups of 3 or more"),
        ("federation.robust=multi-krum secure_aggregation.groups=3", "cannot be told apart by distance"),
        ("federation.robust=trimmed-mean secure_aggregation.groups=3", "cuts off none of 3 groups"),
        ("federation.robust=group-testing secure_aggregation.groups=3", "groups is 3; expected 6 or more"),
        ("federation.robust=group-testing secure_aggregation.enabled=false", "the server sees every update; expected"),
        ("federation.robust=median secure_aggregation.enabled=false compression.form=ring", "compares single updates"),
        ("federation.robust=median", "with 6 or more, or secure_aggregation.enabled = false"),
        (
            "federation.robust=median secure_aggregation.enabled=false compression.form=ring",
            'or compression.form = "dense"',
        ),
        ("federation.clip_norm=1.0", "leave it out, or set secure_aggregation.enabled = false"),
        ("federation.weight=examples", 'expected "uniform", or secure_aggregation.enabled = false'),
        (
            "federation.aggregation=flora export.formats=[]",
            'expected secure_aggregation.enabled = false and compression.preset = "none"',
        ),
        ("data.partition=by-colour", "data.partition"),
        ("training.learning_rate=nan", "training.learning_rate"),
        ("evaluation.metric=bleu", "evaluation.metric"),
        ("evaluation.metric=rouge-l data.evaluation=", "data.evaluation is empty"),
        ("simulation.dropout=1.5", "simulation.dropout"),
        ("training.seed=-1", "training.seed"),
        ("federation=3", "expected section.key=value"),
    ],
)
def test_contradictions_and_impossible_values_are_refused(override: str, complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        load_job(None, override.split())


def test_a_job_file_names_its_base_and_its_training_data(tmp_path: Path) -> None:
    path = write(tmp_path, "[federation]\nrounds = 3\n")
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "model.base is not set",
        "data.train is not set",
    ]
    assert load_job(path, ["model.base=demo", "data.train=demo"]).federation.rounds == 3


@pytest.mark.parametrize(("train", "evaluation"), [("mine.jsonl", ""), ("demo", "demo")])
def test_only_the_demos_clients_are_scored_on_the_demos_examples(tmp_path: Path, train: str, evaluation: str) -> None:
    path = write(tmp_path, f'[model]\nbase = "demo"\n[data]\ntrain = "{train}"\n')
    assert load_job(path).data.evaluation == evaluation


@pytest.mark.parametrize("text", ["[model", "\x00", "[model]\nbase = 1979-05-27\n", "model = 3\n"])
def test_what_is_not_a_job_file_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(JobError, match=r"job\.toml: "):
        load_job(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read: No such file"):
        load_job(tmp_path / "none.toml")


def test_paths_are_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    path = write(tmp_path, '[model]\nbase = "base"\n[data]\ntrain = "clients/*.jsonl"\nevaluation = "eval.jsonl"\n')
    job = load_job(path)
    assert job.model.base == str(tmp_path / "base")
    assert job.data.train == str(tmp_path / "clients/*.jsonl")
    assert job.data.evaluation == str(tmp_path / "eval.jsonl")


def test_a_dumped_job_reads_back_equal(tmp_path: Path) -> None:
    job = load_job(None, ["federation.clients_per_round=0.25", "training.local_epochs=2", "federation.deadline=60"])
    assert load_job(write(tmp_path, dump_job(job))) == job


@pytest.mark.parametrize("robust", ["none", "median", "trimmed-mean federation.robust_share=0.4"])
def test_a_job_in_groups_may_have_a_rule_over_them_and_trains_one_tier(robust: str) -> None:
    job = load_job(None, ["secure_aggregation.groups=3", *f"federation.robust={robust}".split()])
    assert job.tiers == (job.adapter.rank,)
