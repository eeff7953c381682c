"""The `ray` backend gives the same result as the local one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from federation_helpers import Simulate, small_job

from fedtune.core.adapter.adapter_files import load_adapter
from fedtune.core.errors import RunError
from fedtune.server.run_directory import read_rounds
from fedtune.server.simulation.ray_executor import RayExecutor
from fedtune.server.simulation.simulation_context import SimulationContext

pytest.importorskip("ray")


def test_an_actor_that_is_gone_for_good_ends_the_run_with_a_remedy() -> None:
    import ray

    def get(handle: object) -> None:
        raise ray.exceptions.ActorDiedError

    executor: Any = object.__new__(RayExecutor)
    executor._ray = SimpleNamespace(get=get, exceptions=ray.exceptions)
    with pytest.raises(RunError, match=r"ended 4 times .* lower simulation\.workers"):
        executor._result(None)


@pytest.mark.slow
# Ray leaves its processes and log files to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_pool_of_workers_trains_the_same_adapter(simulate: Simulate, tmp_path: Path) -> None:
    faults = ("simulation.dropout=0.2", "simulation.failing=0.2", "federation.rounds=3")
    local = simulate(*faults, name="local")
    spread = simulate(*faults, "simulation.backend=ray", "simulation.workers=2", name="ray")
    layout = SimulationContext.begin(small_job(), tmp_path).model.layout
    adapters = [load_adapter(tmp_path / name / "adapter", layout) for name in ("local", "ray")]
    np.testing.assert_allclose(adapters[0], adapters[1], rtol=1e-4, atol=1e-6)
    assert spread["eval_after"]["loss"] == pytest.approx(local["eval_after"]["loss"], rel=1e-4)
    assert spread["records"] == local["records"]
    reasons = [[client["dropped"] for line in read_rounds(tmp_path / name) for client in line["clients"]]
               for name in ("local", "ray")]  # fmt: skip
    assert reasons[0] == reasons[1]
