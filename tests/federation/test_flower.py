"""fedtune's strategy is a Flower strategy: it runs in anyone's ServerApp, under its own loop and under Flower's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from federation_helpers import Simulate, small_job
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedtune.core.adapter.layout import adapter_digest
from fedtune.flower.in_process_grid import InProcessGrid
from fedtune.flower.strategy import ADAPTER, AdapterStrategy
from fedtune.server.simulation.executors import LocalExecutor
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.assembly import assemble

Federation = tuple[AdapterStrategy, InProcessGrid]
NODES = {1000: "000", 1001: "001", 1002: "002", 1003: "003"}


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    simulation_context = SimulationContext.begin(small_job(), tmp_path / "clients")
    executor = LocalExecutor(simulation_context, NODES)
    strategy = AdapterStrategy(
        assemble(simulation_context.job, simulation_context.base, simulation_context.model.layout),
        lambda _: {name: node_id for node_id, name in NODES.items()},
    )
    yield strategy, InProcessGrid(executor, list(NODES))
    executor.close()


def digest(result: Result) -> str:
    return adapter_digest(result.arrays[ADAPTER].numpy())


def test_its_own_loop_gives_what_a_simulation_gives(federation: Federation, simulate: Simulate) -> None:
    strategy, grid = federation
    seen: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"size": arrays[ADAPTER].numpy().size})

    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=4, evaluate_fn=evaluate)
    assert digest(result) == simulate()["adapter_digest"]
    assert seen == [0, 1, 2, 3, 4]
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert result.evaluate_metrics_clientapp[4]["num-examples"] == 4


def test_flower_s_loop_gives_the_same(federation: Federation, simulate: Simulate) -> None:
    strategy, grid = federation
    result = Strategy.start(strategy, grid, strategy.initial_arrays(), num_rounds=4)
    assert digest(result) == simulate()["adapter_digest"]
    assert result.train_metrics_clientapp[1]["survivors"] == 3
