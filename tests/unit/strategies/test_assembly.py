"""User-defined parts are objects that are passed in.

Toys of every kind run whole federations, and the package does not know them. A combination that cannot work is refused
by every way of assembling a federation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import BASE, DeviceParts, run_federation
from numpy_trainer import LAYOUT, NumpyTrainer

from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.adapter.layout import AdapterLayout, Factors, Vector
from fedtune.core.codec.update_forms import FORMS
from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.errors import JobError, PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.methods import AGGREGATIONS, Method
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import TrainRequest, decode
from fedtune.core.round_records import ClientRecord, RoundRecord
from fedtune.data.examples import Example
from fedtune.strategies.aggregation import (
    Aggregate,
    Aggregation,
    Aggregator,
    Decoded,
    Frame,
    Mean,
    RingMean,
    Unpacked,
    Update,
)
from fedtune.strategies.assembly import Clients, Parts, assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.cohorts.selection import UniformSelection
from fedtune.strategies.federation import initial_state
from fedtune.strategies.requests import plan_round
from fedtune.strategies.round import TrainingRound

pytestmark = pytest.mark.usefixtures("paired")

CLEAR = ("secure_aggregation.enabled=false", "data.holdout=0.0", "federation.rounds=2", "training.local_steps=1")


def job(*overrides: str) -> Job:
    return load_job(None, [*CLEAR, *overrides])


# -- a nonlinear aggregator that needs the devices' help ---------------------------------------------------------------


@dataclass(frozen=True)
class SignVote:
    """An aggregator that moves each coordinate by a step along the majority's sign (signSGD, Bernstein et al. 2018)."""

    step: float
    method: Method = Method(sees_updates="counts signs")  # noqa: RUF009 - frozen

    def begin(self, frame: Frame) -> Votes:
        return Votes(frame, self.step)


class Votes:
    """The aggregation of one round's votes."""

    def __init__(self, frame: Frame, step: float) -> None:
        self._total, self._step = np.zeros(frame.size), step

    def add(self, update: Update) -> None:
        assert set(np.unique(update.values)) <= {-1.0, 0.0, 1.0}, "devices send signs"
        self._total += update.values

    def merge(self, other: Votes) -> None:
        self._total += other._total

    def finish(self) -> Aggregate:
        return Aggregate((self._step * np.sign(self._total)).astype(np.float32))


def send_signs(layout: AdapterLayout, factors: Factors, received: Vector, update: Vector) -> Vector:
    """Replaces a device's update by its signs."""
    del layout, factors, received
    return np.sign(update).astype(np.float32)


def test_a_toy_aggregator_that_devices_help_is_an_object_on_either_side(tmp_path: Path) -> None:
    parts, devices = Parts(aggregator=SignVote(0.125)), DeviceParts(postprocess=[send_signs])
    rounds = run_federation(job("compression.preset=none"), 5, tmp_path, parts=parts, devices=devices)
    moved = rounds[0][0].adapter - LAYOUT.initial(0)
    assert set(np.unique(np.abs(moved).round(3))) <= {0.0, 0.125}
    assert np.abs(moved).max() == pytest.approx(0.125)


def test_an_aggregator_that_sees_single_updates_is_refused_where_only_their_sum_is_seen() -> None:
    with pytest.raises(JobError, match="counts signs, but updates travel as words of a ring"):
        assemble(job("compression.form=ring"), BASE, LAYOUT, parts=Parts(aggregator=SignVote(0.1)))


def test_an_aggregator_of_updates_is_never_dropped_in_silence() -> None:
    with pytest.raises(JobError, match="takes one update at a time, but updates travel as words of a ring"):
        assemble(job("compression.form=ring"), BASE, LAYOUT, parts=Parts(aggregator=Mean(Method())))


# -- noise, around the innermost aggregator ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Noised:
    """An aggregator that adds noise to the aggregate once a round, for any inner aggregator."""

    inner: Aggregator[Any]
    scale: float

    @property
    def method(self) -> Method:
        return self.inner.method

    def begin(self, frame: Frame) -> Noise:
        return Noise(self.inner.begin(frame), self.scale)


class Noise:
    """The aggregation of one round with its noise."""

    def __init__(self, inner: Aggregation[Any], scale: float) -> None:
        self._inner, self._scale = inner, scale

    def add(self, update: Any) -> None:
        self._inner.add(update)

    def merge(self, other: Noise) -> None:
        self._inner.merge(other._inner)

    def finish(self) -> Aggregate:
        aggregate = self._inner.finish()
        noise = np.random.default_rng(0).normal(0.0, self._scale, aggregate.update.size).astype(np.float32)
        return replace(aggregate, update=aggregate.update + noise)


@pytest.mark.parametrize(
    "overrides",
    [
        ("secure_aggregation.enabled=true", "federation.clients_per_round=5"),
        ("compression.form=ring",),
        ("compression.preset=none", "federation.clip_norm=1.0"),
    ],
    ids=["under masks", "in a ring", "in the clear"],
)
def test_toy_noise_is_one_object_under_masks_and_in_the_clear(overrides: tuple[str, ...], tmp_path: Path) -> None:
    one_round = job(*overrides, "federation.rounds=1")
    (plain, _), *_ = run_federation(one_round, 5, tmp_path / "plain")
    noised = Parts(around=lambda inner: Noised(inner, 0.01))
    (noisy, _), *_ = run_federation(one_round, 5, tmp_path / "noisy", parts=noised)
    added = (noisy.adapter - plain.adapter)[LAYOUT.segment("ab")]
    assert added.std() == pytest.approx(0.01, rel=0.1)


# -- a level of aggregation between devices and server -----------------------------------------------------------------


@dataclass(frozen=True)
class Sites:
    """Deals updates out to sites, each with an aggregation of its own, and merges what the sites have added."""

    inner: Aggregator[Any]
    count: int

    @property
    def method(self) -> Method:
        return self.inner.method

    def begin(self, frame: Frame) -> SiteAggregation:
        return SiteAggregation([self.inner.begin(frame) for _ in range(self.count)])


class SiteAggregation:
    """One round's sites."""

    def __init__(self, sites: Sequence[Aggregation[Any]]) -> None:
        self._sites, self._dealt = sites, 0

    def add(self, update: Any) -> None:
        self._sites[self._dealt % len(self._sites)].add(update)
        self._dealt += 1

    def merge(self, other: SiteAggregation) -> None:
        for own, theirs in zip(self._sites, other._sites, strict=True):
            own.merge(theirs)

    def finish(self) -> Aggregate:
        first, *others = self._sites
        for each in others:
            first.merge(each)
        return first.finish()


@pytest.mark.parametrize("overrides", [(), ("compression.form=ring",), ("federation.clip_norm=1.0",)])
def test_toy_sites_give_the_adapter_that_one_server_gives(overrides: tuple[str, ...], tmp_path: Path) -> None:
    flat = run_federation(job(*overrides), 5, tmp_path / "flat")
    sited = run_federation(job(*overrides), 5, tmp_path / "sites", parts=Parts(around=lambda inner: Sites(inner, 3)))
    assert sited[-1][0].adapter.tobytes() == flat[-1][0].adapter.tobytes()


# -- a form of compression ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfForm:
    """A form with two bytes a value."""

    name: str = "half"

    def encode(self, update: Vector, terms: FactorTerms, private_seed: int) -> bytes:
        del terms, private_seed
        return update.astype("<f2").tobytes()

    def decode(self, payload: bytes, terms: FactorTerms) -> Vector:
        if len(payload) != 2 * terms.count:
            raise PeerError(f"payload: {len(payload)} bytes, expected {2 * terms.count}")
        return np.frombuffer(payload, dtype="<f2").astype(np.float32)


def test_a_toy_form_of_compression_is_an_object_that_both_sides_hold(tmp_path: Path) -> None:
    half = HalfForm()
    halved = run_federation(
        job(), 3, tmp_path / "half", parts=Parts(form=half), devices=DeviceParts(forms={**FORMS, half.name: half})
    )
    exact = run_federation(job("compression.preset=none"), 3, tmp_path / "exact")
    sizes = [rounds[0][1].traffic.bytes_up for rounds in (halved, exact)]
    assert sizes[0] < 0.52 * sizes[1]
    np.testing.assert_allclose(halved[0][0].adapter, exact[0][0].adapter, atol=1e-3)


def test_a_device_that_does_not_know_the_form_refuses_and_says_which_it_knows(tmp_path: Path) -> None:
    rounds = run_federation(job(), 3, tmp_path, parts=Parts(form=HalfForm()))
    dropped = {client.dropped for client in rounds[0][1].clients}
    assert all(
        "the form 'half' is asked for; this device knows exact, dense, sparse, ring" in (why or "") for why in dropped
    )


def test_a_form_that_cannot_be_masked_is_refused_under_secure_aggregation() -> None:
    from fedtune.core.secagg import Roster
    from fedtune.strategies.secure_sum import SecureAggregation

    secure = SecureAggregation(Roster({}))
    with pytest.raises(JobError, match="updates of the form half cannot be masked"):
        assemble(load_job(None), BASE, LAYOUT, secure=secure, parts=Parts(form=HalfForm()))


# -- a trainer, a selection policy, a tracker, a change to the aggregate -----------------------------------------------


@dataclass(frozen=True)
class Idle(NumpyTrainer):
    """A trainer that changes nothing."""

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        result = super().train(examples, received, task)
        return replace(result, update=np.zeros_like(result.update))


def test_a_toy_trainer_is_an_object_that_the_device_is_given(tmp_path: Path) -> None:
    rounds = run_federation(job("compression.preset=none"), 3, tmp_path, devices=DeviceParts(trainer=Idle()))
    assert rounds[-1][1].aborted is None
    assert np.array_equal(rounds[-1][0].adapter, LAYOUT.initial(0))


@dataclass(frozen=True)
class InTurn(UniformSelection):
    """A selection of one client a round, in the order of names."""

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        return [sorted(population)[(round_number - 1) % len(population)]]


def test_a_toy_selection_policy_chooses_every_cohort(tmp_path: Path) -> None:
    rounds = run_federation(job(), 4, tmp_path, parts=Parts(selection=InTurn(1, 0)))
    assert [[client.id for client in record.clients] for _, record in rounds] == [["00"], ["01"]]


@dataclass
class Diary:
    """A tracker that records its calls in order."""

    lines: list[str] = field(default_factory=list)

    def client(self, record: ClientRecord) -> None:
        self.lines.append(record.id)

    def round(self, record: RoundRecord) -> None:
        self.lines.append(f"round {record.round}")


def test_a_toy_tracker_is_told_of_every_client_beside_the_others(tmp_path: Path) -> None:
    one, other = Diary(), Diary()
    run_federation(job(), 2, tmp_path, parts=Parts(trackers=[one, other]))
    assert one.lines == other.lines
    assert [line for line in one.lines if line.startswith("round")] == ["round 1", "round 2"]
    assert [sorted(one.lines[:2]), one.lines[2], sorted(one.lines[3:5])] == [["00", "01"], "round 1", ["00", "01"]]


def test_the_aggregate_may_be_changed_before_the_server_takes_its_step(tmp_path: Path) -> None:
    def halve(layout: AdapterLayout, factors: Any, aggregate: Vector) -> Vector:
        del layout, factors
        return aggregate * np.float32(0.5)

    exact = job("compression.preset=none", "federation.rounds=1")
    (whole, _), *_ = run_federation(exact, 3, tmp_path / "whole")
    (half, _), *_ = run_federation(exact, 3, tmp_path / "half", parts=Parts(postprocess=[halve]))
    first = LAYOUT.initial(0)
    np.testing.assert_allclose(half.adapter - first, 0.5 * (whole.adapter - first), atol=1e-7)


# -- combinations of a job's settings ----------------------------------------------------------------------------------


def test_the_same_job_is_put_together_by_nesting() -> None:
    def aggregator(*overrides: str) -> Any:
        return assemble(job(*overrides), BASE, LAYOUT).collector.aggregator

    assert aggregator("compression.form=ring") == Unpacked(RingMean(AGGREGATIONS["fedavg"]))
    assert aggregator() == Decoded(Mean(AGGREGATIONS["fedavg"]), FORMS["dense"])
    assert aggregator("compression.preset=none").form is FORMS["exact"]


@pytest.mark.parametrize("around", [(), ("federation.clip_norm=1.0",), ("federation.robust=median",)])
def test_fedrot_asks_devices_to_align_whatever_goes_around_it(around: tuple[str, ...]) -> None:
    federation = assemble(job("federation.aggregation=fedrot", *around), BASE, LAYOUT)
    round_ = TrainingRound.open(
        federation, initial_state(federation), ["ann"], Broadcast(LAYOUT, initial_state(federation).adapter, bits=4)
    )
    assert decode(round_.requests.payload("ann"), TrainRequest).work.align


@pytest.mark.parametrize("policy", ["deadline", "utility"])
def test_a_selection_by_time_is_refused_where_nobody_predicts_any(policy: str) -> None:
    timed = job(f"federation.selection={policy}")
    with pytest.raises(JobError, match=f'"{policy}", but nothing here predicts how long clients take'):
        assemble(timed, BASE, LAYOUT)
    federation = assemble(timed, BASE, LAYOUT, Clients(4, seconds={}))
    assert not isinstance(federation.selection, UniformSelection)


def test_ranks_reach_the_plan_of_a_round_from_wherever_it_is_put_together() -> None:
    federation = assemble(job(), BASE, LAYOUT, Clients(ranks={"ann": 4, "bob": 16}.__getitem__))
    plan = plan_round(federation, initial_state(federation), ["ann", "bob"])
    assert plan.tiers == {"ann": 4, "bob": 16}


@pytest.mark.parametrize("enabled", [True, False])
def test_secure_aggregation_and_identities_come_together_or_not_at_all(enabled: bool) -> None:
    from fedtune.core.secagg import Roster
    from fedtune.strategies.secure_sum import SecureAggregation

    secure = None if enabled else SecureAggregation(Roster({}))
    with pytest.raises(JobError, match="with the identities of the devices, and false without them"):
        assemble(load_job(None, [f"secure_aggregation.enabled={str(enabled).lower()}"]), BASE, LAYOUT, secure=secure)
