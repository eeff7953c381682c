"""Five small jobs whose adapters and traffic are recorded: what a change of the structure must leave as it is.

A digest or a byte count that differs is a change of behaviour. It is recorded again only in a commit that names what
was meant to change: `python tests/golden/test_golden.py` writes what the code gives now to recorded.json.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from numpy_trainer import DIGEST, LAYOUT, NumpyTrainer, load_examples

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device
from fedtune.client.message_handlers import handle_in_the_clear, handle_under_secure_aggregation
from fedtune.core.adapter.layout import AdaptedModule, adapter_digest
from fedtune.core.job.device_kinds import Fleet, Kind
from fedtune.core.job.job_file import load_job
from fedtune.core.ledger import Ledger
from fedtune.core.protocol.actions import Handler
from fedtune.core.protocol.payloads import Base
from fedtune.flower.envelope import WireMessage, answer_wire
from fedtune.flower.in_process_grid import InProcessGrid, Outgoing
from fedtune.flower.strategy import AdapterStrategy
from fedtune.model.shape import ModelShape
from fedtune.server.simulation.faults import with_faults
from fedtune.server.simulation.simulated_fleet import SimulatedFleet, VirtualRounds
from fedtune.server.simulation.simulated_identities import Enrolment
from fedtune.strategies.assembly import Clients, assemble
from fedtune.strategies.federation import initial_state
from fedtune.strategies.secure_sum import SecureAggregation

BASE = Base("golden", DIGEST, "nf4", LAYOUT.rank, LAYOUT.alpha, ("all-linear",), 256)
# Ten times as wide as the layout, so that links decide what rank a plan can afford.
LINEAR = tuple(AdaptedModule(each.name, 10 * each.d_in, 10 * each.d_out) for each in LAYOUT.modules)
SHAPE = ModelShape("golden", LINEAR, 100_000, 4, 64, 64, 32, 128, True, 512, 256, 1 << 20)
FLEET = Fleet(
    (
        Kind("phone", 5, 900.0, 600.0, 2.5, 400.0, availability=0.9, failure_rate=0.05, jitter=0.2),
        Kind("board", 3, 700.0, 300.0, 4.0, 900.0, availability=0.95, jitter=0.1),
        Kind("laptop", 4, 4000.0, 4000.0, 900.0, 9000.0, charging=0.9, jitter=0.1),
    )
)
EVERY_JOB = (
    "data.holdout=0.0",
    "data.evaluation=",
    "federation.rounds=4",
    "training.learning_rate=0.02",
    "training.local_steps=3",
    "training.seed=11",
)
CLEAR = "secure_aggregation.enabled=false"

# Job -> how many clients there are, and what the job says.
JOBS: dict[str, tuple[int, tuple[str, ...]]] = {
    "secure default": (8, ("federation.clients_per_round=6", "simulation.dropout=0.15")),
    "sparse in the clear": (
        8,
        (CLEAR, "federation.clients_per_round=0.75", "federation.weight=tokens", "simulation.failing=0.2"),
    ),
    "mixed ranks with a fleet": (48, ("federation.clients_per_round=24",)),
    "alternating with robust mean": (
        8,
        (
            CLEAR,
            "federation.aggregation=alternating",
            "federation.robust=trimmed-mean",
            "federation.server_optimizer=momentum",
        ),
    ),
    "exact float32": (6, (CLEAR, "compression.preset=none", "federation.weight=uniform", "training.schedule=cosine")),
}
RECORDED = Path(__file__).with_name("recorded.json")


class _Inline:
    """Answers every message when it is submitted, in the order of submission."""

    def __init__(self, handler: Handler, clients: dict[int, str]) -> None:
        self._handler, self._clients = handler, clients

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        future: Future[WireMessage] = Future()
        try:
            future.set_result(answer_wire(message.pack(), self._clients[message.node], self._handler))
        except Exception as error:
            future.set_exception(error)
        return future


def run(name: str, folder: Path) -> dict[str, Any]:
    """Runs one of the jobs; returns its adapter's SHA-256, and its bytes by direction and purpose."""
    folder.mkdir(exist_ok=True)
    count, overrides = JOBS[name]
    job = load_job(None, [*EVERY_JOB, *overrides])
    clients = {1000 + index: f"{index:02d}" for index in range(count)}
    nodes = {client: node_id for node_id, client in clients.items()}
    enrolment = Enrolment.rehearse(list(nodes), job)
    fleet = SimulatedFleet(job, FLEET, list(nodes), SHAPE) if "fleet" in name else None
    share = fleet.work if fleet else lambda client, request: 1.0
    device = Device(lambda base: NumpyTrainer(), load_examples, ClientStore(folder / "clients"), share)
    secure = job.secure_aggregation.enabled
    handler = handle_under_secure_aggregation(device, enrolment.credentials) if secure else handle_in_the_clear(device)
    executor = _Inline(with_faults(handler, job.simulation, job.training.seed, secure), clients)
    known, grid = Clients(count), InProcessGrid(executor, list(clients))
    if fleet:
        known = Clients(count, fleet.rank, fleet.predicted, fleet.present, virtual_time=True)
        grid = InProcessGrid(executor, list(clients), VirtualRounds(fleet, clients, folder / "virtual.jsonl"))
    identities = SecureAggregation("golden", enrolment.roster, _clock()) if secure else None
    federation = assemble(job, BASE, LAYOUT, known, secure=identities)
    strategy = AdapterStrategy(federation, lambda _: nodes, grid.stale_updates)
    rounds = list(strategy.rounds(grid, initial_state(federation), job.federation.rounds))
    state, records = rounds[-1][0], [record for _, record in rounds]
    assert sum(record.aborted is None for record in records) >= 3, [record.aborted for record in records]
    if fleet:
        assert len({client.rank for record in records for client in record.clients}) > 2, "ranks are not mixed"
    traffic = sum((record.traffic for record in records), Ledger()).to_json()
    moved = {way: {purpose: entry["bytes"] for purpose, entry in traffic[way].items()} for way in ("up", "down")}
    return {"adapter": adapter_digest(state.adapter), "bytes": moved}


def _clock() -> Callable[[], int]:
    ticks = itertools.count(1_800_000_000_000, 1_000)
    return lambda: next(ticks) * 1_000_000


@pytest.mark.parametrize("name", JOBS)
def test_a_recorded_job_gives_the_same_adapter_and_moves_the_same_bytes(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path) == json.loads(RECORDED.read_text())[name]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        recorded = {each: run(each, Path(scratch) / each) for each in JOBS}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
