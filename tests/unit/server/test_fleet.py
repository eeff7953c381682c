"""Clients as devices: who is there, who is in time, and that nobody is left out for being slow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fedtune.core.errors import JobError
from fedtune.core.fleet import Fleet, load_fleet
from fedtune.core.job import Job, load_job
from fedtune.demo import FLEET
from fedtune.model.shape import shape_of
from fedtune.server.run_directory import read_virtual
from fedtune.server.simulation.fleet import SimulatedFleet
from fedtune.strategies.selection import UniformSelection

NAMES = [f"{index:03d}" for index in range(100)]


def job(*overrides: str) -> Job:
    fixed = ["simulation.fleet=bundled", "data.sequence_length=64", "training.batch_tokens=288"]
    return load_job(None, [*fixed, "secure_aggregation.enabled=false", *overrides])


def devices(*overrides: str, fleet: Fleet | None = None) -> SimulatedFleet:
    settings = job(*overrides)
    return SimulatedFleet(settings, fleet or load_fleet(FLEET), NAMES, shape_of(settings.model))


def cohorts(fleet: SimulatedFleet, rounds: int = 60) -> Any:
    selection = fleet.selection(UniformSelection(10, 0))
    for number in range(1, rounds):
        cohort = selection.cohort(number, NAMES)
        yield number, cohort, fleet.round(number, cohort)


def test_only_those_present_are_asked_and_all_of_it_repeats() -> None:
    fleet = devices()
    for number, cohort, virtual in cohorts(fleet, 10):
        assert set(cohort) <= set(fleet.present(number, NAMES))
        assert virtual == devices().round(number, cohort)
    assert fleet.present(1, NAMES) != fleet.present(2, NAMES)


def test_with_deadlines_rounds_are_much_shorter_and_every_kind_still_contributes() -> None:
    seconds, counted = {}, {}
    for policy in ("uniform", "deadline"):
        fleet = devices(f"federation.selection={policy}")
        rounds = list(cohorts(fleet))
        seconds[policy] = sum(virtual.course.seconds for _, _, virtual in rounds)
        counted[policy] = Counter(fleet.kinds[name].name for _, _, virtual in rounds for name in virtual.course.arrived)
    assert seconds["deadline"] < 0.6 * seconds["uniform"]
    total = sum(counted["deadline"].values())
    assert set(counted["deadline"]) == {kind.name for kind in load_fleet(FLEET).kind}
    assert counted["deadline"]["single-board computer"] > 0.05 * total


def test_a_kind_that_the_model_does_not_fit_sits_out_with_the_numbers() -> None:
    phone, *others = load_fleet(FLEET).kind
    fleet = devices(fleet=Fleet((replace(phone, memory_mb=500), *others)))
    assert "phone: the base model does not fit this device: the smallest plan" in fleet.refusals["phone"]
    assert all(fleet.kinds[name].name != "phone" for number in range(5) for name in fleet.present(number, NAMES))
    with pytest.raises(JobError, match="no kind that the model fits"):
        devices(fleet=Fleet((replace(phone, memory_mb=500),)))


def test_a_selection_by_deadline_needs_a_fleet() -> None:
    with pytest.raises(JobError, match=r"simulation\.fleet names no fleet"):
        load_job(None, ["federation.selection=deadline"])


def test_a_line_of_the_clocks_log_that_a_crash_cut_off_is_left_out(tmp_path: Any) -> None:
    path = tmp_path / "virtual.jsonl"
    assert read_virtual(path) == []
    path.write_text('{"round": 1}\n{"rou')
    assert read_virtual(path) == [{"round": 1}]
