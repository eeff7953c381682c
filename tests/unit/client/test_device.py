"""The state that a device keeps from one message to the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from in_process import base_of
from numpy_trainer import CORE_LAYOUT, DIGEST, NumpyTrainer, load_examples
from numpy_trainer import LAYOUT as GOLDEN

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device, UpdateChange
from fedtune.client.live.device_home import JobMemory
from fedtune.core.adapter.basis import align_update
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Factors, Vector, adapter_digest
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.codec import ExactCodec
from fedtune.core.codec.downlink import FIRST
from fedtune.core.codec.update_forms import FORMS
from fedtune.core.errors import ModelError, PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.messages import Base, TrainRequest, decode
from fedtune.strategies.assembly import assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.federation import initial_state
from fedtune.strategies.round import TrainingRound

pytestmark = pytest.mark.usefixtures("paired")

LAYOUT = LoraLayout((AdaptedModule("q", 4, 3),), rank=2, alpha=2.0)


def test_two_jobs_that_begin_with_the_same_adapter_both_remember_it(tmp_path: Path) -> None:
    memory, first = JobMemory(tmp_path), LAYOUT.initial(0)
    trainer: Any = SimpleNamespace(layout=LAYOUT, digest="0" * 64)
    device = Device(lambda base: trainer, lambda *asked: [], memory)
    adapter = Broadcast(LAYOUT, first, bits=4).write(FIRST, first)
    base = SimpleNamespace(digest="0" * 64, kind="lora", fixed="")
    request: Any = SimpleNamespace(base=base, adapter=adapter, job_seed=0)
    for job in ("one", "two"):
        memory.begin(job, b"")
        assert device.hold(request) == adapter_digest(first)
        kept = memory.adapter(adapter_digest(first), LAYOUT.size)  # the base of the next round's change
        assert kept is not None, job
        assert kept.tobytes() == first.tobytes()


def test_a_device_whose_fixed_factors_differ_refuses_with_both_digests(tmp_path: Path) -> None:
    device = Device(lambda base: NumpyTrainer(CORE_LAYOUT), load_examples, ClientStore(tmp_path))
    job = load_job(None, ["secure_aggregation.enabled=false", "adapter.kind=core", "data.holdout=0"])
    for fixed, refusal in ((CORE_LAYOUT.fixed_digest, None), ("0" * 64, r"digest [0-9a-f]{16}; the job is for 0{16}")):
        base = msgspec.structs.replace(base_of(CORE_LAYOUT), fixed=fixed)
        federation = assemble(job, base, CORE_LAYOUT)
        broadcast = Broadcast(CORE_LAYOUT, CORE_LAYOUT.initial(0), bits=None)
        round_ = TrainingRound.open(federation, initial_state(federation), ["01"], broadcast)
        next(round_.exchanges())
        request = decode(round_.requests.payload("01"), TrainRequest)
        if refusal is None:
            assert device.train("01", request).examples
        else:
            with pytest.raises(ModelError, match=refusal):
                device.train("01", request)


def trained_update(folder: Path, aggregation: str, *postprocess: UpdateChange) -> Vector:
    """Returns the update of one client of a job in the clear, at full precision, in its first round."""
    overrides = ["secure_aggregation.enabled=false", "compression.preset=none", "data.holdout=0"]
    job = load_job(None, [*overrides, f"federation.aggregation={aggregation}"])
    base = Base("golden", DIGEST, "nf4", GOLDEN.rank, GOLDEN.alpha, ("all-linear",), 256)
    device = Device(lambda base: NumpyTrainer(), load_examples, ClientStore(folder), postprocess=postprocess)
    federation = assemble(job, base, GOLDEN)
    broadcast = Broadcast(GOLDEN, GOLDEN.initial(0), bits=None)
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


def request_of(number: int, *overrides: str) -> TrainRequest:
    """Returns the request of one round of a job to one of four clients."""
    job = load_job(None, ["data.holdout=0", "secure_aggregation.enabled=false", *overrides])
    base = Base("golden", DIGEST, "nf4", GOLDEN.rank, GOLDEN.alpha, ("all-linear",), 256)
    federation = assemble(job, base, GOLDEN)
    state = replace(initial_state(federation), round=number - 1)
    round_ = TrainingRound.open(
        federation, state, ["00", "01", "02", "03"], Broadcast(GOLDEN, GOLDEN.initial(0), bits=4)
    )
    next(round_.exchanges())
    return decode(round_.requests.payload("01"), TrainRequest)


def device_in(folder: Path) -> Device:
    return Device(lambda base: NumpyTrainer(), load_examples, ClientStore(folder))


def test_words_for_a_sum_follow_from_their_round_alone_whatever_a_device_was_asked_before(tmp_path: Path) -> None:
    """A server that gives one device another past than the others must not find that past in a later sum."""
    fresh, asked = device_in(tmp_path / "fresh"), device_in(tmp_path / "asked")
    asked.train("01", request_of(1, "compression.form=sparse"))
    asked.contribute("01", request_of(1, "compression.form=ring", "compression.bits=1"))
    assert ClientStore(tmp_path / "asked").residual("01", "b", GOLDEN.size_b, 2).values.any(), "there is a memory"
    later = request_of(2, "compression.form=ring")
    for one, other in zip(fresh.contribute("01", later).parts, asked.contribute("01", later).parts, strict=True):
        assert np.array_equal(one.words, other.words)
        assert np.array_equal(one.auxiliary, other.auxiliary)


def test_a_device_refuses_to_carry_a_residual_into_a_sum(tmp_path: Path) -> None:
    request, device = request_of(1, "compression.form=ring"), device_in(tmp_path)
    hostile = msgspec.structs.replace(request, uplink=msgspec.structs.replace(request.uplink, error_feedback=True))
    for ask in (device.contribute, device.train):
        with pytest.raises(PeerError, match="error feedback in a ring: a residual carried into a later sum"):
            ask("01", hostile)
    assert not list(tmp_path.rglob("residuals"))


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_in_the_clear_a_device_sends_later_what_it_did_not_send(form: str, tmp_path: Path) -> None:
    asked = request_of(1, f"compression.form={form}", "compression.error_feedback=true", "compression.bits=2")
    _, sent = device_in(tmp_path).train("01", asked).update
    _, exact = device_in(tmp_path / "exact").train("01", request_of(1, "compression.preset=none")).update
    (terms,) = [each for each in device_in(tmp_path).terms(asked) if each.factor == "b"]
    unsent = ExactCodec().decode(exact, GOLDEN.size_b) - FORMS[form].decode(sent, terms)
    residual = ClientStore(tmp_path).residual("01", "b", GOLDEN.size_b, 2).values
    assert np.linalg.norm(unsent) > 0
    assert np.array_equal(residual, unsent)
