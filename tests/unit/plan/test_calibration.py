"""The trial step: measured in its own process, stored, and printed by the command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from one_backend import Only

from fedtune.client.plan import trial
from fedtune.client.plan.backend import Case, Measured
from fedtune.client.plan.calibration import Calibration, CalibrationStore
from fedtune.client.plan.device_plan import DevicePlanner
from fedtune.client.plan.planner import RESERVE, NoPlanError
from fedtune.client.plan.step_costs import Choices
from fedtune.client.torch.torch_backend import TorchBackend
from fedtune.client.torch.trial_step import measure
from fedtune.core.errors import DataError, ModelError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import CORE_RANK, AdapterSettings, ModelSettings
from fedtune.server import cli

JOB = ["data.sequence_length=64", "training.batch_tokens=256"]


class Told(TorchBackend):
    """A meter that gives the test's measurements."""

    def __init__(self, measured: Callable[[Case], Measured]) -> None:
        super().__init__()
        self._measured = measured

    def measure(self, case: Case) -> Measured:
        return self._measured(case)


def never(case: Case) -> Measured:
    pytest.fail(f"a step was tried: {case}")


def planned(
    tmp_path: Path, *overrides: str, measured: Callable[[Case], Measured] = never, reserve: float = RESERVE, **ask: Any
) -> Any:
    planner = DevicePlanner(Only(Told(measured)), CalibrationStore(tmp_path), reserve=reserve)
    return planner.plan(load_job(None, [*JOB, *overrides]), **ask)


def test_the_demo_is_planned_measured_and_foretold_within_a_fifth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fedtune", "plan", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["plan"]["rank"] == outcome["plan"]["tier"] == CORE_RANK
    assert outcome["measured"]["peak_bytes"] > 10_000_000
    assert 0.8 < outcome["measured"]["peak_ratio"] < 1.25
    assert len(list((tmp_path / "fedtune" / "calibration").iterdir())) == 1


def test_what_was_measured_corrects_the_next_plan(tmp_path: Path) -> None:
    first = planned(tmp_path, trial="never")
    assert (first.kappa, first.measured) == (1.0, None)
    twice = Measured(1, 1, 1, 2 * first.plan.memory.training, 1.5, first.plan.choices.tokens, 3)
    planned(tmp_path, measured=lambda case: twice)
    again = planned(tmp_path, trial="never")
    assert again.kappa > 2
    assert again.plan.memory.training == pytest.approx(2 * first.plan.memory.training, rel=1e-6)
    assert again.seconds_per_step == pytest.approx(1.5)
    assert again.plan.choices.threads == 3


def test_a_step_that_takes_more_than_may_be_used_is_planned_again(tmp_path: Path) -> None:
    tried: list[Case] = []

    def hungry(case: Case) -> Measured:
        tried.append(case)
        tokens = case.choices.tokens
        return Measured(1, 1, 1, 30_000_000 + 3_000_000 * tokens, 0.1, tokens, 1)

    free = 1000
    own = planned(tmp_path / "none", trial="never").runtime // 1_000_000
    memory = (own + free) * 1_000_000
    outcome = planned(tmp_path, "training.batch_tokens=4096", measured=hungry, reserve=0.0, memory=memory)
    assert len(tried) == 2
    assert tried[1].micro_batch < tried[0].micro_batch
    assert outcome.measured.peak == 30_000_000 + 3_000_000 * outcome.plan.choices.tokens


def test_a_device_too_small_is_told_so_before_anything_is_tried(tmp_path: Path) -> None:
    with pytest.raises(NoPlanError, match="does not fit this device"):
        planned(tmp_path, memory=1_000_000)


def test_the_data_decides_length_and_share_of_targets(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "turn on the lamp =>", "completion": " ok"}) + "\n")
    outcome = planned(tmp_path, data=data, trial="never")
    assert outcome.plan.choices.sequence_length < 64
    assert outcome.target_share < 0.7
    with pytest.raises(DataError, match="no such file"):
        planned(tmp_path, data=tmp_path / "none.jsonl", trial="never")


def test_a_calibration_that_is_damaged_or_absurd_is_as_good_as_none(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    assert store.get("key") is None
    store.keep("key", Calibration(1.25, 0.01, 2))
    assert store.get("key") == Calibration(1.25, 0.01, 2)
    assert store.get("other") is None
    store.keep("key", Calibration(1000.0, 0.01, 2))
    assert store.get("key") is None
    (path,) = tmp_path.iterdir()
    whole: dict[str, Any] = {"kappa": 1, "seconds_per_token": 1, "threads": 1}
    wrong: list[dict[str, Any]] = [
        {"kappa": math.nan},
        {"threads": 0},
        {"threads": 10**6},
        {"threads": math.inf},
        {"threads": None},
    ]
    texts = [json.dumps(whole | each) for each in wrong]
    for text in ("", "[]", '{"kappa": 1, "seconds_per_token": 1}', *texts, "{"):
        path.write_text(text)
        assert store.get("key") is None


@pytest.mark.parametrize(
    ("seconds", "tried"),
    [
        ({8: 1.0, 4: 2.0, 2: 0.1, 1: 0.1}, {8, 4}),
        ({8: 2.0, 4: 1.0, 2: 1.5, 1: 0.1}, {8, 4, 2}),
        ({8: 4.0, 4: 3.0, 2: 3.0, 1: 1.0}, {8, 4, 2, 1}),
        ({8: math.inf}, {8}),
        ({3: 2.0, 1: 3.0}, {3, 1}),
        ({1: 1.0}, {1}),
    ],
)
def test_threads_are_halved_while_that_is_no_slower(seconds: dict[int, float], tried: set[int]) -> None:
    asked: set[int] = set()

    def took(threads: int) -> float:
        asked.add(threads)
        return seconds[threads]

    trial.try_threads(took, max(seconds))
    assert asked == tried


def test_a_trial_measures_memory_before_it_tries_other_numbers_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Noting:
        def reset(self) -> int:
            return 0

        def peak(self) -> int:
            events.append("peak")
            return 7

    def step(loaded: trial.Loaded, case: Case) -> float:
        return 1.0 if events[-1] == 2 else 3.0

    monkeypatch.setattr(trial, "take_step", step)
    loaded: Any = None
    case = Case(ModelSettings(), AdapterSettings(), Choices("packed", "bf16", 16, 64, 128, False, threads=4), cores=4)
    found = trial.measured_steps(case, Noting(), lambda: loaded, events.append)
    assert (found.threads, found.step_seconds, found.training) == (2, 1.0, 7)
    assert events == ["peak", "peak", 2, 1]
    assert trial.measured_steps(case, Noting(), lambda: loaded).threads == 4, "a library that cannot change it"
    small = replace(case, choices=replace(case.choices, threads=1), cores=8)
    times: dict[object, float] = {1: 1.0, 8: 1.4, 4: 1.5}
    monkeypatch.setattr(trial, "take_step", lambda loaded, case: times.get(events[-1], 1.0))
    events.append("before")
    assert trial.measured_steps(small, Noting(), lambda: loaded, events.append).threads == 1
    monkeypatch.setattr(trial, "_SECONDS_BEFORE_OTHERS", -1)
    events.clear()
    assert trial.measured_steps(small, Noting(), lambda: loaded, events.append).threads == 1
    assert events == ["peak", "peak"], "a device that is so slow tries no other number"


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    choices = Choices("packed", "bf16", 16, 64, 128, False)
    with pytest.raises(ModelError, match=r"^[^:]*none: not a directory"):
        measure(Case(ModelSettings(str(tmp_path / "none")), AdapterSettings(), choices))
