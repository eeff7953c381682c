"""The digest of a job's terms: the same on every machine, another for every change that a device would notice."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_terms import SETTINGS, JobTerms
from fedtune.core.protocol.messages import Base

BASE = Base("demo", "0" * 64, "nf4", 40, 32.0, ("all-linear",), 256, "core", "1" * 64)


def terms(*overrides: str) -> JobTerms:
    return JobTerms(load_job(None, ["training.learning_rate=0.03", *overrides]), BASE)


def through_json(held: JobTerms) -> tuple[Any, Any]:
    return json.loads(json.dumps(held.settings)), json.loads(json.dumps(held.described))


CHANGES = (
    *("training.learning_rate=0.02", "training.seed=1", "training.local_steps=21", "training.schedule=cosine"),
    *("federation.run=2", "federation.rounds=21", "federation.clients_per_round=11", "federation.deadline=60.0"),
    *("adapter.rank=32", "adapter.tiers=[8, 40]", "data.holdout=0.2", "data.balance=kind", "compression.bits=4"),
    *("secure_aggregation.max_corrupt=0.2", "secure_aggregation.enabled=false", "model.quantization=int4"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_devices_notice_changes_digest_and_randomness(change: str) -> None:
    assert terms(change).digest != terms().digest
    assert terms(change).seed != terms().seed


def test_terms_without_balance_are_those_that_earlier_releases_read() -> None:
    assert "balance" not in terms().settings["data"]
    assert terms("data.balance=kind").settings["data"]["balance"] == "kind"


@pytest.mark.parametrize(
    "change", ["federation.evaluate_every=5", "evaluation.metric=token-f1", "simulation.workers=1", "data.evaluation="]
)
def test_a_change_that_concerns_the_server_alone_changes_neither(change: str) -> None:
    assert (terms(change).digest, terms(change).seed) == (terms().digest, terms().seed)


def test_another_base_is_another_job_and_another_name_for_it_is_not() -> None:
    other = replace(terms(), base=msgspec.structs.replace(BASE, digest="2" * 64))
    renamed = replace(terms(), base=msgspec.structs.replace(BASE, name="/models/demo"))
    assert other.digest != terms().digest == renamed.digest


@pytest.mark.parametrize("overrides", [(), *((change,) for change in CHANGES)])
def test_terms_read_back_from_json_are_the_same_job(overrides: tuple[str, ...]) -> None:
    held = terms(*overrides)
    read = JobTerms.read(*through_json(held))
    assert (read.digest, read.seed, read.base) == (held.digest, held.seed, held.base)


def change(section: str, key: str, value: Any) -> Any:
    return lambda settings, base: settings[section].__setitem__(key, value)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (change("training", "learning_rate", -1.0), "learning_rate"),
        (change("training", "learning_rate", float("nan")), "learning_rate"),
        (change("training", "pace", 3), "unknown key"),
        (change("federation", "evaluate_every", 3), r"federation.evaluate_every is no term"),
        (change("data", "train", "/etc/passwd"), r"data.train is no term"),
        (change("compression", "error_feedback", True), "error_feedback"),
        (lambda settings, base: settings["training"].pop("learning_rate"), "state the learning rate"),
        (lambda settings, base: settings.pop("adapter"), "sections"),
        (lambda settings, base: settings.update(adapter=3), "cannot be read"),
        (lambda settings, base: settings.update(adapter=None), "cannot be read"),
        (lambda settings, base: base.update(digest="zz"), "matching regex"),
        (lambda settings, base: base.update(rank=0), ">= 1"),
        (lambda settings, base: base.update(more=1), "a base has the fields"),
        (lambda settings, base: base.pop("name"), "a base has the fields"),
    ],
)
def test_what_are_no_terms_is_refused_with_the_reason(spoil: Any, complaint: str) -> None:
    settings, base = through_json(terms())
    spoil(settings, base)
    with pytest.raises(PeerError, match=complaint):
        JobTerms.read(settings, base)


def test_every_section_of_terms_is_one_of_a_job() -> None:
    known = {section: set(keys) for section, keys in as_sections().items()}
    for section, keys in SETTINGS.items():
        assert set(keys) <= known[section]


def as_sections() -> dict[str, dict[str, Any]]:
    from dataclasses import asdict

    return asdict(load_job(None))
