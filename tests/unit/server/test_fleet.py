"""Simulated devices: their presence and durations, and that slow ones are not left out permanently."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import JobError
from fedtune.core.job.device_kinds import Fleet, load_fleet
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.demo import FLEET
from fedtune.model.shape import shape_of
from fedtune.server.run_directory import read_virtual
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate
from fedtune.server.simulation.simulated_fleet import SimulatedFleet
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.cohorts.selection import AmongPresent, UniformSelection
from fedtune.strategies.cohorts.timed_selection import timed_selection

NAMES = [f"{index:03d}" for index in range(100)]


def job(*overrides: str) -> Job:
    fixed = ["adapter.kind=lora", "simulation.fleet=bundled", "data.sequence_length=64", "training.batch_tokens=288"]
    return load_job(None, [*fixed, "secure_aggregation.enabled=false", *overrides])


def devices(*overrides: str, fleet: Fleet | None = None) -> SimulatedFleet:
    settings = job(*overrides)
    return SimulatedFleet(settings, fleet or load_fleet(FLEET), NAMES, shape_of(settings.model))


def cohorts(fleet: SimulatedFleet, rounds: int = 60) -> Any:
    timed = timed_selection(fleet._job, 10, fleet.predicted)
    selection = AmongPresent(timed or UniformSelection(10, 0), fleet.present)
    for number in range(1, rounds):
        cohort = selection.cohort(number, NAMES)
        yield number, cohort, fleet.round(number, cohort)


def test_only_those_present_are_asked_and_all_of_it_repeats() -> None:
    fleet = devices()
    for number, cohort, virtual in cohorts(fleet, 10):
        assert set(cohort) <= set(fleet.present(number, NAMES))
        assert virtual == devices().round(number, cohort)
    assert fleet.present(1, NAMES) != fleet.present(2, NAMES)


@pytest.mark.parametrize("secure", ["false", "true"])
def test_with_deadlines_rounds_are_much_shorter_and_every_kind_still_contributes(secure: str) -> None:
    seconds, counted = {}, {}
    for policy in ("uniform", "deadline"):
        fleet = devices(f"federation.selection={policy}", f"secure_aggregation.enabled={secure}")
        rounds = list(cohorts(fleet))
        seconds[policy] = sum(virtual.course.seconds for _, _, virtual in rounds)
        counted[policy] = Counter(fleet.kinds[name].name for _, _, virtual in rounds for name in virtual.course.arrived)
    assert seconds["deadline"] < 0.6 * seconds["uniform"]
    total = sum(counted["deadline"].values())
    assert set(counted["deadline"]) == {kind.name for kind in load_fleet(FLEET).kind}
    assert counted["deadline"]["single-board computer"] > 0.05 * total


def test_a_secure_round_waits_beyond_its_deadline_for_as_many_as_its_sum_needs() -> None:
    fleet = devices("federation.selection=deadline", "secure_aggregation.enabled=true")
    waited = 0
    for _, cohort, virtual in cohorts(fleet):
        assert len(virtual.course.arrived) >= len(cohort) - int(0.3 * len(cohort)) or None in virtual.seconds.values()
        waited += virtual.course.seconds > (virtual.deadline or 0.0)
    assert waited


def test_a_device_that_is_not_charging_too_hot_or_on_a_metered_link_is_not_asked() -> None:
    phone, *_ = load_fleet(FLEET).kind
    kind = replace(phone, availability=1.0, charging=0.7, cool=0.8, unmetered=0.9)
    fleet = devices(fleet=Fleet((kind,)))
    reasons = Counter(fleet.absence(number, name) for number in range(20) for name in NAMES)
    total = reasons.total()
    assert reasons["not charging"] / total == pytest.approx(0.3, abs=0.03)
    assert reasons["not cool"] / total == pytest.approx(0.7 * 0.2, abs=0.03)
    assert reasons["not unmetered"] / total == pytest.approx(0.7 * 0.8 * 0.1, abs=0.02)
    assert reasons["not reachable"] == 0
    assert all(fleet.absence(3, name) is None for name in fleet.present(3, NAMES))


def test_a_kind_on_a_slow_link_trains_a_smaller_tier_and_one_on_a_hopeless_link_none() -> None:
    phone, *others = load_fleet(FLEET).kind
    slow, hopeless = replace(phone, uplink_kbit=20.0), replace(phone, name="modem", count=1, uplink_kbit=1.0)
    fleet = devices(fleet=Fleet((slow, hopeless, *others)))
    tiers = {fleet.kinds[name].name: fleet.rank(name) for name in NAMES}
    assert tiers["phone"] in (4, 8)
    assert tiers["laptop"] == 16
    assert "modem: sending a rank-4 update takes" in fleet.refusals["modem"]
    assert tiers["modem"] == 0
    alike = devices("federation.aggregation=fedrot", fleet=Fleet((slow, *others)))
    assert "the job has the tiers (16,)" in alike.refusals["phone"]


def test_a_kind_with_little_memory_trains_on_examples_cut_to_its_plan(tmp_path: Path) -> None:
    text = FLEET.read_text(encoding="utf-8")
    assert "memory_mb = 3000" in text
    file = tmp_path / "fleet.toml"
    file.write_text(text.replace("memory_mb = 3000", "memory_mb = 570"), encoding="utf-8")
    long = [f'{{"text": "{"dim the attic lights and close the shutters " * 8}"}}' for _ in range(3)]
    for name in NAMES:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(long) + "\n", encoding="utf-8")
    settings = ("data.sequence_length=128", f"data.train={tmp_path}/*.jsonl", "data.evaluation=", "export.formats=[]")
    simulation_context = SimulationContext.begin(job(*settings, f"simulation.fleet={file}"), tmp_path / "clients")
    assert simulation_context.devices is not None
    longest = {
        kind.name: max(
            len(example.ids) for example in simulation_context.examples(name, simulation_context.trainer, 128)
        )
        for name, kind in simulation_context.devices.kinds.items()
    }
    assert longest["phone"] == 64
    assert longest["laptop"] > 64


def test_a_kind_that_the_model_does_not_fit_sits_out_with_the_numbers() -> None:
    phone, *others = load_fleet(FLEET).kind
    fleet = devices(fleet=Fleet((replace(phone, memory_mb=500), *others)))
    assert "phone: the base model does not fit this device: the smallest plan" in fleet.refusals["phone"]
    assert all(fleet.kinds[name].name != "phone" for number in range(5) for name in fleet.present(number, NAMES))
    with pytest.raises(JobError, match="no kind that the model fits"):
        devices(fleet=Fleet((replace(phone, memory_mb=500),)))


def test_a_simulated_selection_by_deadline_needs_a_fleet(tmp_path: Path) -> None:
    job = load_job(None, ["federation.selection=deadline"])  # which live devices' times will do for
    with pytest.raises(JobError, match=r"simulation\.fleet names no fleet"):
        simulate(job, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_a_line_of_the_clocks_log_that_a_crash_cut_off_is_left_out(tmp_path: Any) -> None:
    path = tmp_path / "virtual.jsonl"
    assert read_virtual(path) == []
    path.write_text('{"round": 1}\n{"rou')
    assert read_virtual(path) == [{"round": 1}]
