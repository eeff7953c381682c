"""Federations in groups: their adapter follows from the groups' sums, and tracing goes on after a resume."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from federation_helpers import SECURE, Simulate, run, small_job, without_pictures
from secure_fixture import Fixture

from fedtune.core.adapter.layout import Vector
from fedtune.core.codec.update_forms import RING, RingTotal
from fedtune.core.protocol.messages import TRAIN, Handler, Request, TrainRequest, decode
from fedtune.core.round_records import RoundRecord
from fedtune.core.secagg.exchanged import MaskedInput, RoundConfig
from fedtune.core.secagg.exchanged import decode as decode_message
from fedtune.core.secagg.exchanged import encode as encode_message
from fedtune.server.report.reading import read_run
from fedtune.server.run_directory import CLIENTS, RunDirectory, read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulated_run import run_job
from fedtune.server.simulation.simulation_context import SimulationContext

NAMES = [f"client-{index:02d}" for index in range(13)]
GROUPED = ("data.clients=9", "federation.clients_per_round=9", "secure_aggregation.groups=3", "data.holdout=0")


def group_mean(fixture: Fixture, request: TrainRequest, group: tuple[str, ...]) -> Vector:
    """Returns the mean over one group, summed in the clear."""
    terms = fixture.device.terms(request)
    totals: dict[int, RingTotal] = {}
    for name in group:
        for index, part in enumerate(fixture.device.contribute(name, request).parts):
            total = RingTotal(part, 1)
            totals[index] = RING.join(totals[index], total, terms[index]) if index in totals else total
    return np.concatenate([RING.mean(totals[index], each).update for index, each in enumerate(terms)])


@pytest.mark.parametrize("robust", ["none", "median"])
def test_the_step_is_the_mean_or_the_rule_over_the_sums_that_the_groups_give_in_the_clear(robust: str) -> None:
    overrides = ("secure_aggregation.groups=4", f"federation.robust={robust}", "federation.aggregation=fedavg")
    fixture = Fixture(NAMES, overrides)
    round_ = fixture.open()
    groups, request = round_.plan.grouping.groups, decode(round_.requests.payload(NAMES[0]), TrainRequest)
    assert sorted(map(len, groups)) == [3, 3, 3, 4]
    assert request.uplink.n_max == 4, "the largest group's size"
    before = fixture.state.adapter
    record = fixture.run()
    means = [group_mean(fixture, request, group) for group in groups]
    weights = [len(group) for group in groups]
    expected = np.median(means, axis=0) if robust == "median" else np.average(means, axis=0, weights=weights)
    np.testing.assert_allclose(fixture.state.adapter - before, expected, atol=1e-7)
    assert record.secure is not None
    assert (record.secure.summed, record.secure.groups, record.secure.smallest) == (13, 4, 3)
    assert record.secure.minimum == 3


def test_each_device_sees_its_own_group_as_the_cohort() -> None:
    fixture = Fixture(NAMES, ["secure_aggregation.groups=4"])
    round_ = fixture.open()
    exchange = next(round_.exchanges())
    for group in round_.plan.grouping.groups:
        for name in group:
            config = decode_message(exchange.requests[name][0], RoundConfig, 1 << 20)
            assert tuple(member.client for member in config.cohort) == group
            assert fixture.rounds.open(name, *exchange.requests[name])


def test_a_simulation_in_groups_says_what_the_server_saw(simulate: Simulate, tmp_path: Path) -> None:
    summary = simulate(*SECURE, *GROUPED, "federation.robust=median")
    assert summary["secure_aggregation"]["sums"] == 6
    assert summary["secure_aggregation"]["groups"] == 3
    assert summary["secure_aggregation"]["summed_least"] == 3
    assert [line["secure"]["groups"] for line in read_rounds(tmp_path / "run")] == [3, 3]
    assert read_run(tmp_path / "run").rounds[0].secure is not None


def hostile(handler: Handler) -> Handler:
    """Makes one client spoil the auxiliary sums of every sum that it is in."""

    def handle(client: str, request: Request) -> bytes:
        payload = handler(client, request)
        if client != "003" or request.action != TRAIN:
            return payload
        masked = decode_message(payload, MaskedInput, len(payload))
        *words, auxiliary = masked.segments
        spoiled = (*words, bytes(byte ^ 0xA5 for byte in auxiliary))
        return encode_message(msgspec.structs.replace(masked, segments=spoiled))

    return handle


class Interrupted(Silent):
    """A display that raises KeyboardInterrupt when the second round is shown."""

    def round(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_to_trace_who_makes_sums_fail(simulate: Simulate, tmp_path: Path) -> None:
    overrides = (*SECURE, "data.clients=9", "federation.clients_per_round=9", "data.holdout=0", "federation.rounds=7")
    simulate(*overrides, wrap=hostile, name="whole")
    job, path = small_job(*overrides), tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        run(job, path, Interrupted(), wrap=hostile)
    context = SimulationContext.begin(job, path / CLIENTS, wrap=hostile)
    with closing(RunDirectory.open(path)) as directory, without_pictures():
        run_job(context, directory, Silent())
    whole, half = read_rounds(tmp_path / "whole"), read_rounds(path)
    assert whole[0]["aborted"]
    assert len(whole[-1]["survivors"]) == len(whole[-1]["cohort"]) == 8
    assert "003" not in whole[-1]["cohort"]
    for undisturbed, resumed in zip(whole, half, strict=True):
        assert undisturbed["survivors"] == resumed["survivors"]
        told = [[note for note in line["notes"] if "has no sum" not in note] for line in (undisturbed, resumed)]
        assert told[0] == told[1]
