"""fedtune's strategy is a Flower strategy: it runs in any ServerApp, under its own loop and under Flower's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation_helpers import FinishedRun, small_job
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy
from in_process import BASE
from numpy_trainer import LAYOUT

from fedtune.core.adapter.layout import adapter_digest
from fedtune.core.errors import JobError
from fedtune.flower.in_process_grid import InProcessGrid
from fedtune.flower.strategy import ADAPTER, AdapterStrategy
from fedtune.server.simulation import stock_flower
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


def test_its_own_loop_gives_what_a_simulation_gives(federation: Federation, whole: FinishedRun) -> None:
    strategy, grid = federation
    seen: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"size": arrays[ADAPTER].numpy().size})

    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=4, evaluate_fn=evaluate)
    assert digest(result) == whole.summary["adapter_digest"]
    assert seen == [0, 1, 2, 3, 4]
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert result.evaluate_metrics_clientapp[4]["num-examples"] == 4


def test_flower_s_loop_gives_the_same(federation: Federation, whole: FinishedRun) -> None:
    strategy, grid = federation
    result = Strategy.start(strategy, grid, strategy.initial_arrays(), num_rounds=4)
    assert digest(result) == whole.summary["adapter_digest"]
    assert result.train_metrics_clientapp[1]["survivors"] == 3


def test_stock_flower_deals_out_the_ranks_of_the_job_in_the_order_of_its_nodes() -> None:
    class Grid:
        def get_node_ids(self) -> list[int]:
            return [71, 12, 35]

    def ranks(*overrides: str) -> Any:
        grid: Any = Grid()
        return stock_flower.stock_strategy(small_job(*overrides), BASE, LAYOUT, grid).federation.ranks

    dealt = ranks("simulation.ranks=[16, 4]")
    assert [dealt(name) for name in ("12", "35", "71")] == [16, 4, 16]
    assert ranks() is None


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("simulation.fleet=bundled secure_aggregation.enabled=false", "Flower's engine has no virtual clock"),
        ("secure_aggregation.enabled=true", "Flower's engine makes new clients for every message"),
    ],
)
def test_stock_flower_refuses_what_its_engine_cannot_do(overrides: str, complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        stock_flower._job({"set": overrides})


def test_stock_flower_refuses_a_selection_by_time_instead_of_taking_everybody() -> None:
    timed = stock_flower._job({"set": "federation.selection=deadline secure_aggregation.enabled=false"})
    with pytest.raises(JobError, match="nothing here predicts how long clients take"):
        stock_flower.stock_strategy(timed, BASE, LAYOUT, None)  # type: ignore[arg-type]
