"""Devices with torch and devices without it train one adapter together, under secure aggregation.

The clients are those of a simulation; half of them train on an edge pack of the same base with onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from federation_helpers import EVALUATION, without_pictures

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device
from fedtune.client.message_handlers import handle_under_secure_aggregation
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.core.adapter.layout import Vector
from fedtune.core.codec.noise_seeds import from_seed
from fedtune.core.job.settings import DEMO, ModelSettings
from fedtune.core.protocol.messages import Handler, Request
from fedtune.data.job_inputs import job_or_demo
from fedtune.edge.pack_writer import write_pack
from fedtune.server.preflight import check_simulation
from fedtune.server.run_directory import CLIENTS, RunDirectory
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulated_run import run_job
from fedtune.server.simulation.simulation_context import SimulationContext

ALIKE = ("training.precision=fp32", "simulation.threads=1", "simulation.workers=1", "export.formats=[]")
SMALL = (
    "data.clients=4",
    "data.examples_per_client=60",
    f"data.evaluation={EVALUATION}",
    "federation.rounds=2",
    "federation.clients_per_round=4",
    "secure_aggregation.max_dropout=0.0",
)


@pytest.fixture(scope="module")
def demo_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives an edge pack of the bundled base."""
    directory = tmp_path_factory.mktemp("edge") / "pack"
    write_pack(ModelSettings(DEMO), directory)
    return directory


class Mixed:
    """Gives the second half of the clients a device that trains on an edge pack."""

    def __init__(self, pack: Path, folder: Path) -> None:
        self._pack, self._folder = pack, folder
        self.context: SimulationContext | None = None
        self.without_torch: set[str] = set()

    def __call__(self, handler: Handler) -> Handler:
        assert self.context is not None
        names = sorted(self.context.population.names)
        theirs = names[len(names) // 2 :]

        def answer(client: str, request: Request) -> bytes:
            if client not in theirs:
                return handler(client, request)
            self.without_torch.add(client)
            return self._handler(client, request)

        return answer

    @cached_property
    def _handler(self) -> Handler:
        context = self.context
        assert context is not None
        trainer = open_trainer(self._pack, context.job.adapter, context.base.digest)
        device = Device(
            lambda _: trainer,
            context.examples,
            ClientStore(self._folder),
            agreed=lambda: context.terms,
            noise=from_seed(context.terms.seed),
        )
        return handle_under_secure_aggregation(device, context.enrolment.credentials)


def run(folder: Path, settings: Sequence[str], wrap: Mixed | None = None) -> tuple[Vector, float]:
    """Returns the final adapter of the demo's job, with other settings, and its exact matches."""
    job = job_or_demo(None, [*ALIKE, *settings])
    with without_pictures():
        context = SimulationContext.begin(job, folder / CLIENTS, check_simulation(job), wrap=wrap)
        if wrap is not None:
            wrap.context = context
        with closing(RunDirectory.create(folder, job, context.base.digest)) as directory:
            summary = run_job(context, directory, Silent())
            checkpoint = directory.restore()
    assert checkpoint is not None
    return checkpoint.state.adapter, summary["eval_after"]["exact_match"]


def difference(ours: Vector, theirs: Vector) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.slow
def test_two_devices_of_each_kind_give_the_adapter_of_four_with_torch(demo_pack: Path, tmp_path: Path) -> None:
    theirs, _ = run(tmp_path / "torch", (*SMALL, "adapter.kind=lora"))
    mixed = Mixed(demo_pack, tmp_path / "edge")
    ours, _ = run(tmp_path / "mixed", (*SMALL, "adapter.kind=lora"), mixed)
    assert len(mixed.without_torch) == 2
    assert difference(ours, theirs) < 0.05


@pytest.mark.slow
def test_the_demo_ends_within_a_point_where_half_of_the_clients_have_no_torch(demo_pack: Path, tmp_path: Path) -> None:
    _, theirs = run(tmp_path / "torch", ())
    _, ours = run(tmp_path / "mixed", (), Mixed(demo_pack, tmp_path / "edge"))
    assert theirs > 0.9
    assert ours == pytest.approx(theirs, abs=0.01), (ours, theirs)
