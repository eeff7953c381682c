"""A whole federation in this process, without torch and without a model: real messages, real rounds, a numpy trainer.

rounds = run_federation(load_job(None, overrides), 8, tmp_path)
state, record = rounds[-1]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from numpy_trainer import DIGEST, LAYOUT, NumpyTrainer, load_examples

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device, UpdateChange, all_of_it
from fedtune.client.message_handlers import handle_in_the_clear, handle_under_secure_aggregation
from fedtune.client.trainer import Trainer
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout
from fedtune.core.codec.update_forms import FORMS, UpdateForm
from fedtune.core.job.device_kinds import Fleet
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Base, Handler
from fedtune.core.round_records import RoundRecord
from fedtune.flower.envelope import WireMessage, answer_wire
from fedtune.flower.in_process_grid import InProcessGrid, Outgoing
from fedtune.flower.strategy import AdapterStrategy
from fedtune.model.shape import ModelShape
from fedtune.server.simulation.faults import with_faults
from fedtune.server.simulation.simulated_fleet import SimulatedFleet, VirtualRounds
from fedtune.server.simulation.simulation_context import Enrolment
from fedtune.strategies.assembly import NO_PARTS, Clients, Parts, assemble
from fedtune.strategies.federation import FederationState, initial_state
from fedtune.strategies.secure_sum import SecureAggregation


def base_of(layout: AdapterLayout) -> Base:
    """Returns the description of the base model with an adapter of this layout."""
    return Base(
        "golden", DIGEST, "nf4", layout.rank, layout.alpha, ("all-linear",), 256, layout.kind, layout.fixed_digest
    )


BASE = base_of(LAYOUT)
# Ten times as wide as the layout, so that links decide what rank a plan can afford.
LINEAR = tuple(AdaptedModule(each.name, 10 * each.d_in, 10 * each.d_out) for each in LAYOUT.modules)
SHAPE = ModelShape("golden", LINEAR, 100_000, 4, 64, 4, 64, 32, 128, True, 512, 256, 1 << 20)


@dataclass(frozen=True)
class DeviceParts:
    """Replacements of parts of the devices; the defaults are a device's own parts."""

    trainer: Trainer = field(default_factory=NumpyTrainer)
    postprocess: Sequence[UpdateChange] = ()
    forms: Mapping[str, UpdateForm] = field(default_factory=lambda: FORMS)


OWN_PARTS = DeviceParts()


class Inline:
    """An executor that answers every message when it is submitted, in the order of submission."""

    def __init__(self, handler: Handler, clients: Mapping[int, str]) -> None:
        self._handler, self._clients = handler, clients

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        future: Future[WireMessage] = Future()
        try:
            future.set_result(answer_wire(message.pack(), self._clients[message.node], self._handler))
        except Exception as error:
            future.set_exception(error)
        return future


def run_federation(
    job: Job,
    count: int,
    folder: Path,
    *,
    fleet: Fleet | None = None,
    parts: Parts = NO_PARTS,
    devices: DeviceParts = OWN_PARTS,
) -> list[tuple[FederationState, RoundRecord]]:
    """Runs a job with `count` clients, named 00, 01 and so on, from its first round to its last."""
    folder.mkdir(exist_ok=True)
    clients = {1000 + index: f"{index:02d}" for index in range(count)}
    nodes = {client: node_id for node_id, client in clients.items()}
    enrolment = Enrolment.rehearse(list(nodes), job)
    simulated = SimulatedFleet(job, fleet, list(nodes), SHAPE) if fleet else None
    device = Device(
        lambda base: devices.trainer,
        load_examples,
        ClientStore(folder / "clients"),
        simulated.work if simulated else all_of_it,
        devices.postprocess,
        devices.forms,
    )
    secure = job.secure_aggregation.enabled
    handler = handle_under_secure_aggregation(device, enrolment.credentials) if secure else handle_in_the_clear(device)
    executor = Inline(with_faults(handler, job.simulation, job.training.seed, secure), clients)
    known, grid = Clients(count), InProcessGrid(executor, list(clients))
    if simulated:
        known = Clients(count, simulated.rank, simulated.predicted, simulated.present, virtual_time=True)
        grid = InProcessGrid(executor, list(clients), VirtualRounds(simulated, clients, folder / "virtual.jsonl"))
    identities = SecureAggregation(enrolment.roster, _clock()) if secure else None
    layout = devices.trainer.layout
    federation = assemble(job, base_of(layout), layout, known, secure=identities, parts=parts)
    strategy = AdapterStrategy(federation, lambda _: nodes, grid.stale_updates, grid.bound_replies)
    return list(strategy.rounds(grid, initial_state(federation), job.federation.rounds))


def _clock() -> Callable[[], int]:
    ticks = itertools.count(1_800_000_000_000, 1_000)
    return lambda: next(ticks) * 1_000_000
