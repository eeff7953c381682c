"""A change of the adapter's basis between rounds keeps the product, and all state in the basis follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from federation_helpers import SECURE, Simulate, small_job

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device
from fedtune.core.adapter.basis import basis_changes, changed, follow
from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.codec import Residual
from fedtune.core.errors import JobError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import TrainRequest, decode, encode, terms_digest
from fedtune.server.run_directory import read_rounds
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.assembly import assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.federation import Federation, FederationState, initial_state
from fedtune.strategies.round import TrainingRound

pytestmark = pytest.mark.usefixtures("paired")

EVERY = "federation.rebalance_every=2"
QUICK = ("data.evaluation=", "data.holdout=0")
LONG = ("federation.rounds=8", "compression.form=sparse")
NAMES = ["000", "001", "002"]


class Fixture:
    """Rounds on one device, with one call a round."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.simulation_context = SimulationContext.begin(small_job(EVERY, *LONG, *overrides), folder)
        self.store = ClientStore(folder)
        self.device = Device(lambda _: self.simulation_context.trainer, self.simulation_context.examples, self.store)
        self.layout = lora_layout(self.simulation_context.model.layout)
        self.federation = assemble(self.simulation_context.job, self.simulation_context.base, self.layout)
        self.broadcast = Broadcast(self.layout, initial_state(self.federation).adapter, bits=8)
        self.states: list[FederationState] = [initial_state(self.federation)]
        self.requests: list[TrainRequest] = []

    def run(self, names: list[str] = NAMES) -> Any:
        round_ = TrainingRound.open(self.federation, self.states[-1], names, self.broadcast)
        next(round_.exchanges())
        for name in names:
            request = decode(round_.requests.payload(name), TrainRequest)
            round_.take_in(name, encode(self.device.train(name, request)))
        self.requests.append(request)
        state, record = round_.close()
        self.states.append(state)
        return record

    def residual(self, client: str, factor: str, before: int) -> Vector:
        size = self.layout.size_a if factor == "a" else self.layout.size_b
        return self.store.residual(client, factor, size, before).values


def with_job(federation: Federation, job: Job) -> Federation:
    """Returns the federation with another job."""
    return replace(federation, terms=replace(federation.terms, job=job))


@pytest.fixture
def fixture(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path)


def products(layout: AdapterLayout, adapter: Vector) -> np.ndarray:
    return np.concatenate(
        [(lora_b.astype(np.float64) @ lora_a).reshape(-1) for lora_a, lora_b in layout.pairs(adapter).values()]
    )


def test_the_product_and_what_devices_hold_stay_what_they_were(fixture: Fixture) -> None:
    assert not fixture.run().notes
    without = with_job(fixture.federation, small_job(*LONG))
    plain = TrainingRound.open(
        without,
        fixture.states[1],
        NAMES,
        Broadcast(fixture.layout, fixture.layout.initial(0), bits=8),
    )
    next(plain.exchanges())
    for name in NAMES:
        payload = fixture.device.train(name, decode(plain.requests.payload(name), TrainRequest))
        plain.take_in(name, encode(payload))
    expected = products(fixture.layout, plain.close()[0].adapter)
    assert fixture.run().notes == ("the adapter's basis was rebalanced",)
    state = fixture.states[2]
    np.testing.assert_allclose(products(fixture.layout, state.adapter), expected, atol=1e-6)
    difference = np.linalg.norm(products(fixture.layout, state.held) - expected)
    assert difference < 0.1 * np.linalg.norm(expected)
    for lora_a, lora_b in fixture.layout.pairs(state.adapter).values():
        ratio = np.linalg.norm(lora_a) / np.linalg.norm(lora_b)
        assert 0.3 < ratio < 3.0, "both factors carry about the same share"
    assert state.rebasing is not None
    assert (state.rebasing.round, state.rebasing.before) == (2, 0)


def test_a_residual_follows_the_basis_of_its_round_and_one_of_an_unknown_basis_starts_again(fixture: Fixture) -> None:
    for _ in range(2):
        fixture.run()
    kept = {factor: fixture.residual("000", factor, 3) for factor in "ab"}
    changes = basis_changes(fixture.layout, fixture.states[1].held)
    seen: dict[str, Vector] = {}
    original = Residual.compensate

    def spy(self: Residual, update: Any, owned: Any) -> Any:
        seen["a" if self.values.size == fixture.layout.size_a else "b"] = self.values
        return original(self, update, owned)

    Residual.compensate = spy  # type: ignore[method-assign]
    try:
        fixture.run(["000"])
        for factor in "ab":
            assert kept[factor].any()
            assert np.array_equal(seen[factor], follow(fixture.layout, changes, factor, kept[factor]))  # type: ignore[arg-type]
        fixture.run(["000"])  # rebalances once more
        fixture.run(["001"])  # whose residual is of round 2, two changes ago
        assert not seen["a"].any()
        assert not seen["b"].any()
    finally:
        Residual.compensate = original  # type: ignore[method-assign]


def test_a_change_of_basis_travels_at_eight_bits_and_reaches_all_clients_of_later_rounds(fixture: Fixture) -> None:
    for _ in range(3):
        fixture.run()
    target, held = fixture.states[2].adapter, fixture.states[2].held
    assert np.linalg.norm(target - held) < 0.02 * np.linalg.norm(target - fixture.states[0].adapter)
    assert sum(map(len, fixture.requests[2].adapter.parts)) < 1.2 * fixture.layout.size
    assert fixture.requests[2].rebasing == fixture.states[2].rebasing
    assert fixture.requests[1].rebasing is None


def test_before_anything_is_learned_the_basis_stays(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, "federation.rebalance_every=1")
    assert fixture.run().notes == ()
    assert fixture.states[1].rebasing is None
    first = fixture.states[0].adapter
    changes = basis_changes(fixture.layout, first)
    assert changed(fixture.layout, changes, first).tobytes() == first.tobytes()


@pytest.mark.parametrize(
    ("optimizer", "note"), [("momentum", None), ("adam", "the server optimizer starts again: squares of coordinates")]
)
def test_a_server_optimizer_s_state_follows_or_starts_again_with_a_reason(
    tmp_path: Path, optimizer: str, note: str | None
) -> None:
    fixture = Fixture(tmp_path, f"federation.server_optimizer={optimizer}")
    fixture.run()
    without = small_job(*LONG, f"federation.server_optimizer={optimizer}")
    fixture.federation = with_job(fixture.federation, without)
    fixture.run()
    plain = fixture.states.pop()
    fixture.federation = with_job(fixture.federation, fixture.simulation_context.job)
    notes = fixture.run().notes
    assert notes[0] == "the adapter's basis was rebalanced"
    state = fixture.states[-1]
    if note is None:
        changes = basis_changes(fixture.layout, fixture.states[1].held)
        for factor in "ab":
            moved = follow(fixture.layout, changes, factor, plain.server[f"optimizer.m.{factor}"])  # type: ignore[arg-type]
            np.testing.assert_array_equal(state.server[f"optimizer.m.{factor}"], moved)
    else:
        assert notes[1].startswith(note)
        assert not state.server


def test_under_secure_aggregation_and_in_the_clear_a_rebalanced_federation_comes_to_the_same_adapter(
    simulate: Simulate, tmp_path: Path
) -> None:
    fixed = (
        *SECURE,
        *QUICK,
        EVERY,
        "federation.rounds=3",
        "simulation.ranks=[16, 4]",
        "federation.clients_per_round=6",
    )
    secret = simulate(*fixed, name="secret")
    clear = simulate(*fixed, "secure_aggregation.enabled=false", "compression.form=ring", name="clear")
    assert secret["adapter_digest"] == clear["adapter_digest"]
    assert read_rounds(tmp_path / "secret")[1]["notes"] == ["the adapter's basis was rebalanced"]


def test_secure_rounds_bind_the_change_of_basis(fixture: Fixture) -> None:
    for _ in range(3):
        fixture.run()
    request = fixture.requests[2]
    assert terms_digest(request) != terms_digest(msgspec.structs.replace(request, rebasing=None))
    assert terms_digest(request) == terms_digest(msgspec.structs.replace(request, tier=4))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["federation.aggregation=ffa"], "keeps A as the job's seed made it"),
        (["federation.aggregation=flora", "compression.preset=none"], "balances both factors every round"),
        (["federation.late=next", "simulation.fleet=bundled"], "changes the basis between rounds"),
    ],
)
def test_what_cannot_be_rebalanced_is_told_when_the_job_is_read(overrides: list[str], complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        load_job(None, ["secure_aggregation.enabled=false", EVERY, *overrides])
