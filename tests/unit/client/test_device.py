"""The state that a device keeps from one message to the next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy_trainer import DIGEST, NumpyTrainer, load_examples
from numpy_trainer import LAYOUT as GOLDEN

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device, UpdateChange
from fedtune.client.live.device_home import JobMemory
from fedtune.core.adapter.basis import align_update
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Factors, Vector, adapter_digest
from fedtune.core.codec import ExactCodec
from fedtune.core.codec.downlink import FIRST
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.messages import Base, TrainRequest, decode
from fedtune.strategies.assembly import assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.federation import initial_state
from fedtune.strategies.round import TrainingRound

LAYOUT = AdapterLayout((AdaptedModule("q", 4, 3),), rank=2, alpha=2.0)


def test_two_jobs_that_begin_with_the_same_adapter_both_remember_it(tmp_path: Path) -> None:
    memory, first = JobMemory(tmp_path), LAYOUT.initial(0)
    trainer: Any = SimpleNamespace(layout=LAYOUT, digest="0" * 64)
    device = Device(lambda base: trainer, lambda *asked: [], memory)
    adapter = Broadcast(LAYOUT, first, exact=False).write(FIRST, first)
    request: Any = SimpleNamespace(base=SimpleNamespace(digest="0" * 64), adapter=adapter, job_seed=0)
    for job in ("one", "two"):
        memory.begin(job, secure=True, terms=b"")
        assert device.hold(request) == adapter_digest(first)
        kept = memory.adapter(adapter_digest(first), LAYOUT.size)  # the base of the next round's change
        assert kept is not None, job
        assert kept.tobytes() == first.tobytes()


def trained_update(folder: Path, aggregation: str, *postprocess: UpdateChange) -> Vector:
    """Returns the update of one client of a job in the clear, at full precision, in its first round."""
    overrides = ["secure_aggregation.enabled=false", "compression.preset=none", "data.holdout=0"]
    job = load_job(None, [*overrides, f"federation.aggregation={aggregation}"])
    base = Base("golden", DIGEST, "nf4", GOLDEN.rank, GOLDEN.alpha, ("all-linear",), 256)
    device = Device(lambda base: NumpyTrainer(), load_examples, ClientStore(folder), postprocess=postprocess)
    federation = assemble(job, base, GOLDEN)
    broadcast = Broadcast(GOLDEN, GOLDEN.initial(0), exact=True)
    round_ = TrainingRound.open(federation, initial_state(federation), ["01"], broadcast)
    next(round_.exchanges())
    reply = device.train("01", decode(round_.requests.payload("01"), TrainRequest))
    sizes = (GOLDEN.size_a, GOLDEN.size_b)
    return np.concatenate([ExactCodec().decode(part, size) for part, size in zip(reply.update, sizes, strict=True)])


def test_an_update_goes_through_every_step_in_order_before_it_is_encoded(tmp_path: Path) -> None:
    seen: list[tuple[str, Vector]] = []

    def double(layout: AdapterLayout, factors: Factors, received: Vector, update: Vector) -> Vector:
        assert (layout, factors, received.tobytes()) == (GOLDEN, "ab", GOLDEN.initial(0).tobytes())
        seen.append(("double", update))
        return 2 * update

    def add_one(layout: AdapterLayout, factors: Factors, received: Vector, update: Vector) -> Vector:
        del layout, factors, received
        seen.append(("add one", update))
        return update + np.float32(1)

    plain = trained_update(tmp_path / "plain", "fedavg")
    assert np.array_equal(trained_update(tmp_path / "both", "fedavg", double, add_one), 2 * plain + np.float32(1))
    assert [name for name, _ in seen] == ["double", "add one"]


def test_steps_see_the_update_aligned_where_the_request_asks_for_it(tmp_path: Path) -> None:
    seen: list[Vector] = []

    def look(layout: AdapterLayout, factors: Factors, received: Vector, update: Vector) -> Vector:
        del layout, factors, received
        seen.append(update)
        return update

    plain = trained_update(tmp_path / "plain", "fedavg")
    sent = trained_update(tmp_path / "aligned", "fedrot", look)
    assert np.array_equal(sent, align_update(GOLDEN, GOLDEN.initial(0), plain))
    assert np.array_equal(seen[0], sent)
