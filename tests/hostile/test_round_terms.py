"""A server that asks a bound device for another round than the job's terms describe is refused, field by field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from in_process import base_of
from numpy_trainer import LAYOUT, NumpyTrainer, load_examples

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device
from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import EvaluateRequest, Rebasing, TrainRequest, decode
from fedtune.strategies.assembly import Clients, assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.federation import Federation, initial_state
from fedtune.strategies.round import TrainingRound

EVERY = ("secure_aggregation.enabled=false", "adapter.kind=lora", "training.learning_rate=0.02")
RING = ("compression.form=ring",)


def opened(*overrides: str, number: int = 1) -> tuple[Federation, TrainRequest]:
    federation = assemble(load_job(None, [*EVERY, *overrides]), base_of(LAYOUT), LAYOUT, Clients(4))
    state = replace(initial_state(federation), round=number - 1)
    broadcast = Broadcast(LAYOUT, initial_state(federation).adapter, bits=4)
    round_ = TrainingRound.open(federation, state, ["00", "01", "02", "03"], broadcast)
    next(round_.exchanges())
    return federation, decode(round_.requests.payload("01"), TrainRequest)


def device(folder: Path, terms: JobTerms | None) -> Device:
    read: list[str] = []

    def load(client: str, *asked: Any) -> Any:
        read.append(client)
        return load_examples(client, *asked)

    made = Device(lambda base: NumpyTrainer(), load, ClientStore(folder), agreed=lambda: terms)
    made.read = read  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("number", [1, 2, 7, 20])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        RING,
        ("training.schedule=cosine",),
        ("training.local_epochs=0.5",),
        ("federation.aggregation=alternating",),
        ("federation.aggregation=fedrot",),
        ("compression.preset=none",),
        ("compression.form=sparse",),
        ("federation.deadline=30.0",),
    ],
)
def test_an_honest_request_follows_from_the_terms(tmp_path: Path, number: int, overrides: tuple[str, ...]) -> None:
    federation, request = opened(*overrides, number=number)
    assert device(tmp_path, federation.terms).train("01", request).round == number


def work(**changes: Any) -> Callable[[TrainRequest], TrainRequest]:
    return lambda request: msgspec.structs.replace(request, work=msgspec.structs.replace(request.work, **changes))


def uplink(**changes: Any) -> Callable[[TrainRequest], TrainRequest]:
    return lambda request: msgspec.structs.replace(request, uplink=msgspec.structs.replace(request.uplink, **changes))


def request_with(**changes: Any) -> Callable[[TrainRequest], TrainRequest]:
    return lambda request: msgspec.structs.replace(request, **changes)


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (work(learning_rate=1e-30), "local work"),
        (work(learning_rate=0.0201), "local work"),
        (work(local_steps=1), "local work"),
        (work(batch_tokens=8), "local work"),
        (work(weight_decay=0.5), "local work"),
        (work(max_gradient_norm=1e-9), "local work"),
        (work(proximal=1e9), "local work"),
        (work(holdout=0.9), "local work"),
        (work(optimizer="muon"), "local work"),
        (work(factors="b"), "local work"),
        (work(align=True), "local work"),
        (work(gradient_checkpointing=True), "local work"),
        (uplink(bits=8), "bits 8"),
        (uplink(form="sparse"), "form sparse"),
        (uplink(density=1e-9), "density"),
        (uplink(rotation=False), "rotation"),
        (uplink(error_feedback=True), "error feedback"),
        (uplink(clips=(1e-9, 1e-9)), "clip 1e-09 of a"),
        (uplink(clips=(1e9, 1e9)), "clip 1e.09 of a"),
        (uplink(clips=(1e9,)), "1 clips for 2 factors"),
        (uplink(tiers=(1, 2)), "tiers"),
        (request_with(job_seed=7), "seed 7"),
        (request_with(round=21), "round 21; the job's terms have 20 rounds"),
        (request_with(round=0), "round 0"),
        (request_with(rebasing=Rebasing(1, "0" * 64, 0)), "a change of basis"),
    ],
)
def test_a_round_that_does_not_follow_from_the_terms_is_refused_before_any_example_is_read(
    tmp_path: Path, lie: Callable[[TrainRequest], TrainRequest], complaint: str
) -> None:
    federation, request = opened(*RING)
    for ask in ("train", "contribute", "hold", "terms"):
        bound = device(tmp_path, federation.terms)
        arguments = ("01",) if ask in ("train", "contribute") else ()
        with pytest.raises(PeerError, match=complaint):
            getattr(bound, ask)(*arguments, lie(request))
        assert not bound.read  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (uplink(rho=1e6), "privacy"),
        (uplink(rho=0.0), "privacy"),
        (uplink(noised=(3,)), "noise of devices"),
        (uplink(clips=(1e-9, 1e-9)), "clip 1e-09 of a"),
        (uplink(clips=(0.3, 0.3)), "clip 0.3 of a"),
    ],
)
def test_a_round_that_spends_more_of_privacy_or_adds_less_noise_than_the_terms_say_is_refused(
    tmp_path: Path, lie: Callable[[TrainRequest], TrainRequest], complaint: str
) -> None:
    federation, request = opened(*RING, "privacy.mode=central", "privacy.epsilon=100")
    assert device(tmp_path, federation.terms).train("01", request).round == 1
    with pytest.raises(PeerError, match=complaint):
        device(tmp_path, federation.terms).train("01", lie(request))


def test_another_base_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    federation, request = opened()
    lie = msgspec.structs.replace(request, base=msgspec.structs.replace(request.base, digest="f" * 64))
    with pytest.raises(PeerError, match="another base model or adapter than the job's terms"):
        device(tmp_path, federation.terms).hold(lie)


def test_an_evaluation_of_another_job_is_refused(tmp_path: Path) -> None:
    federation, request = opened()
    honest = EvaluateRequest(
        request.version, request.job_seed, 1, request.base, federation.job.data.holdout, request.adapter
    )
    bound = device(tmp_path, federation.terms)
    with pytest.raises(NotImplementedError):  # the test's trainer scores nothing; the request got as far as that
        bound.evaluate("01", honest)
    for lie in ({"holdout": 0.9}, {"job_seed": 3}, {"round": 21}):
        with pytest.raises(PeerError, match="the request to evaluate differs"):
            bound.evaluate("01", msgspec.structs.replace(honest, **lie))


def test_the_same_job_under_another_run_number_repeats_no_random_stream(tmp_path: Path) -> None:
    (first, one), (second, other) = opened(*RING), opened(*RING, "federation.run=2")
    assert first.terms.digest != second.terms.digest
    assert one.job_seed != other.job_seed
    with pytest.raises(PeerError, match="seed"):
        device(tmp_path, first.terms).contribute("01", other)
