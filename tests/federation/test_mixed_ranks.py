"""Federations of devices of different rank give the same adapter in the clear and with masks, for any dropouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from federation_helpers import SECURE, Simulate, small_job
from secure_fixture import Fixture

from fedtune.client.client_store import ClientStore
from fedtune.client.device import Device
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.adapter.tiers import rank_indices
from fedtune.core.codec import MaskableCodec
from fedtune.core.codec.packing import pack
from fedtune.core.codec.wire import Kind, frame
from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import SECURE_EXCHANGES, TRAIN, TrainReply, TrainRequest, decode, encode
from fedtune.core.round_records import RoundRecord
from fedtune.server.run_directory import read_rounds
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.assembly import Clients, assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.federation import initial_state
from fedtune.strategies.round import TrainingRound

pytestmark = pytest.mark.usefixtures("paired")

QUICK = ("data.evaluation=", "data.holdout=0", "federation.rounds=2", "training.batch_tokens=256")
NAMES = [f"client-{index}" for index in range(9)]
TIERED = dict(zip(NAMES, [4, 4, 4, 2, 2, 2, 1, 1, 1], strict=True))
FIXTURE = ("adapter.tiers=[1, 2, 4]", "secure_aggregation.max_dropout=0.3")
CLEAR_RING = ("secure_aggregation.enabled=false", "compression.form=ring")


@pytest.mark.parametrize(
    "overrides",
    [
        ("compression.preset=none",),
        (),
        ("compression.form=ring",),
        ("compression.preset=none", "federation.aggregation=flexlora"),
        ("federation.aggregation=alternating", "federation.server_optimizer=momentum", "federation.clip_norm=1.0"),
    ],
)
def test_a_federation_of_mixed_ranks_learns_and_small_tiers_send_less(
    simulate: Simulate, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    simulate(*QUICK, "simulation.ranks=[16, 8, 16, 4]", "federation.clients_per_round=4", *overrides)
    lines = read_rounds(tmp_path / "run")
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    for line in lines:
        sent = {client["rank"]: client["bytes_up"] for client in line["clients"]}
        assert [client["rank"] for client in line["clients"]] == [16, 8, 16, 4]
        assert sent[4] < 0.4 * sent[16]
        assert sent[8] < 0.7 * sent[16]


@pytest.mark.parametrize("aggregation", ["fedavg", "alternating", "ffa"])
def test_under_secure_aggregation_mixed_ranks_come_to_the_adapter_that_the_same_sums_in_the_clear_give(
    aggregation: str,
) -> None:
    chosen = f"federation.aggregation={aggregation}"
    digests = set()
    for overrides in ((), CLEAR_RING):
        fixture = Fixture(NAMES, [*FIXTURE, chosen, *overrides], TIERED)
        for _ in range(3):
            record = fixture.run() if not overrides else in_the_clear(fixture)
            assert record.aborted is None
            assert [client.rank for client in record.clients] == list(TIERED.values())
        digests.add(fixture.digest)
    assert len(digests) == 1


def in_the_clear(fixture: Fixture, survivors: Sequence[str] = NAMES) -> RoundRecord:
    """Runs a round with the same contributions in the clear."""
    round_ = fixture.open()
    exchange = next(round_.exchanges())
    for name in survivors:
        made = fixture.device.contribute(name, decode(exchange.requests[name][0], TrainRequest))
        payloads = []
        for terms, part in zip(made.terms, made.parts, strict=True):
            width = MaskableCodec(terms.bits).ring(terms.context()).width
            body = pack(part.words, width) + part.auxiliary.astype("<u4").tobytes()
            payloads.append(frame(Kind.RING, terms.count, body))
        round_.take_in(name, encode(TrainReply(round_.number, 32, 100, 1, 1.0, 0.1, tuple(payloads))))
    fixture.state, record = round_.close()
    return record


def test_the_whole_federation_comes_to_the_same_adapter_under_secure_aggregation_and_in_the_clear(
    simulate: Simulate, tmp_path: Path
) -> None:
    fixed = (*SECURE, *QUICK, "federation.clients_per_round=6", "simulation.ranks=[16, 4]")
    secret = simulate(*fixed, name="secret")
    clear = simulate(*fixed, *CLEAR_RING, name="clear")
    assert secret["adapter_digest"] == clear["adapter_digest"]
    lines = read_rounds(tmp_path / "secret")
    assert all(line["secure"]["summed"] == 6 for line in lines)
    sent = {client["rank"]: client["bytes_up"] for client in lines[0]["clients"]}
    assert sent[4] < 0.5 * sent[16]


@pytest.mark.parametrize("exchange", SECURE_EXCHANGES)
def test_a_client_of_one_tier_may_vanish_before_any_exchange(exchange: str) -> None:
    ranks = {**TIERED, "client-9": 2}
    secret, clear = (Fixture(sorted(ranks), [*FIXTURE, *form], ranks) for form in ((), CLEAR_RING))
    assert secret.run(lambda name, kind: name == "client-9" and kind == exchange).aborted is None
    counted = exchange in SECURE_EXCHANGES[3:]  # its masked update had arrived by then
    in_the_clear(clear, sorted(ranks) if counted else NAMES)
    assert secret.digest == clear.digest


def test_a_tier_that_falls_below_its_minimum_ends_the_round_and_the_next_one_runs() -> None:
    fixture = Fixture(NAMES, FIXTURE, TIERED)
    before = fixture.digest
    record = fixture.run(lambda name, kind: name == "client-4" and kind == TRAIN)
    assert "2 clients in tier 1, expected at least 3" in (record.aborted or "")
    assert fixture.digest == before
    assert fixture.run().aborted is None


def test_tiers_too_small_to_hide_in_are_merged_downward_or_sit_out_and_the_record_says_so() -> None:
    fixture = Fixture(NAMES, FIXTURE, {**TIERED, "client-0": 2, "client-8": 4})  # tiers 4: 3, 2: 4, 1: 2
    record = fixture.run()
    assert record.aborted is None
    assert [client.rank for client in record.clients] == [2, 4, 4, 2, 2, 2, 0, 0, 4]
    assert record.notes == ("tier 1: 2 of at least 3 clients; sat out",)
    assert record.secure is not None
    assert record.secure.summed == 7
    fixture = Fixture(NAMES, FIXTURE, {**TIERED, "client-0": 2})  # tiers 4: 2, 2: 4, 1: 3
    record = fixture.run()
    assert [client.rank for client in record.clients] == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert [client.tier for client in record.clients] == [2, 4, 4, 2, 2, 2, 1, 1, 1]
    assert record.notes == ("tier 4: 2 of at least 3 clients; trained as tier 2",)


def test_a_device_refuses_to_train_another_tier_than_the_configuration_says() -> None:
    fixture = Fixture(NAMES, FIXTURE, TIERED)
    round_ = fixture.open()
    exchange = next(round_.exchanges())
    config, request = exchange.requests["client-0"]
    for tier in (0, 1, 2, 3):
        lie = encode(msgspec.structs.replace(decode(request, TrainRequest), tier=tier))
        with pytest.raises(PeerError, match="tier"):
            fixture.rounds.open("client-0", config, lie)
    assert fixture.rounds.open("client-0", config, request)


def test_a_client_that_masks_another_tier_than_it_was_asked_for_is_refused() -> None:
    ranks = {**TIERED, "client-9": 1}
    fixture = Fixture(sorted(ranks), FIXTURE, ranks)
    round_ = fixture.open()
    for exchange in round_.exchanges():
        answers = {name: fixture.answer(name, exchange) for name in exchange.requests}
        if exchange.message_type == TRAIN:
            answers["client-9"] = answers["client-0"]
        for name, answer in answers.items():
            round_.take_in(name, answer)
    _, record = round_.close()
    assert record.aborted is None
    dropped = {client.id: client.dropped for client in record.clients if client.dropped}
    assert list(dropped) == ["client-9"]
    assert "9 segments, expected 3" in (dropped["client-9"] or "")


SPARSE = ("adapter.tiers=[4, 16]", "compression.form=sparse", "compression.density=0.1")


@pytest.fixture
def simulation_context(tmp_path: Path) -> SimulationContext:
    return SimulationContext.begin(small_job(*SPARSE), tmp_path / "clients")


def test_what_a_device_does_not_own_in_a_round_waits_in_its_residual(
    simulation_context: SimulationContext, tmp_path: Path
) -> None:
    job, store = simulation_context.job, ClientStore(tmp_path / "clients")
    layout = lora_layout(simulation_context.model.layout)
    device = Device(lambda _: simulation_context.trainer, simulation_context.examples, store)
    clients = Clients(ranks={"000": 4, "001": 16, "002": 16}.__getitem__)
    federation = assemble(job, simulation_context.base, layout, clients)
    state, broadcast = initial_state(federation), Broadcast(layout, layout.initial(0), bits=4)
    residuals: list[np.ndarray] = []
    for number in (1, 2, 3):
        round_ = TrainingRound.open(federation, state, ["000", "001", "002"], broadcast)
        next(round_.exchanges())
        request = decode(round_.requests.payload("000"), TrainRequest)
        round_.take_in("000", encode(device.train("000", request)))
        state, record = round_.close()
        assert record.clients[0].dropped is None
        residuals.append(store.residual("000", "a", layout.size_a, number + 1).values)
        owned = layout.coordinates("a", rank_indices(0, number, 16, 4))
        frozen = np.setdiff1d(np.arange(layout.size_a), owned)
        before = residuals[-2] if number > 1 else np.zeros(layout.size_a)
        assert np.array_equal(residuals[-1][frozen], before[frozen])
        assert residuals[-1][owned].any()
        assert not np.array_equal(residuals[-1][owned], before[owned])
