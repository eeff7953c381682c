"""Federations under secure aggregation give the same adapter as in the clear, for any dropouts, and reveal no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from federation_helpers import SECURE, Simulate, run, small_job

from fedtune.core.errors import JobError
from fedtune.core.protocol.messages import SECURE_EXCHANGES, TRAIN, Handler, Request, TrainReply, decode
from fedtune.core.secagg.exchanged import MaskedInput
from fedtune.core.secagg.exchanged import decode as decode_message
from fedtune.server.run_directory import read_rounds
from fedtune.server.simulation.simulation_context import SimulationContext, Wrap

pytestmark = pytest.mark.usefixtures("paired")

CLEAR_RING = (*SECURE, "secure_aggregation.enabled=false", "compression.form=ring")
Drop = Callable[[str, Request], bool]


def losing(drop: Drop) -> Wrap:
    """Makes clients that never answer a message for which drop(client, request) is true."""

    def wrap(handler: Handler) -> Handler:
        def handle(client: str, request: Request) -> bytes:
            if drop(client, request):
                raise ConnectionError("gone")
            return handler(client, request)

        return handle

    return wrap


@pytest.mark.parametrize("aggregation", ["fedavg", "alternating"])
def test_the_adapter_is_the_one_that_the_same_sum_in_the_clear_gives(simulate: Simulate, aggregation: str) -> None:
    chosen = f"federation.aggregation={aggregation}"
    secret, clear = simulate(*SECURE, chosen, name="secret"), simulate(*CLEAR_RING, chosen, name="clear")
    assert secret["adapter_digest"] == clear["adapter_digest"]
    assert secret["secure_aggregation"]["sums"] == 2
    assert secret["secure_aggregation"]["summed_least"] == 5


@pytest.mark.parametrize("exchange", SECURE_EXCHANGES)
def test_a_client_may_vanish_before_any_exchange(simulate: Simulate, tmp_path: Path, exchange: str) -> None:
    def drop(client: str, request: Request) -> bool:
        return request.action == exchange and client == "001"

    one_round = ("federation.rounds=1", "data.clients=5", "data.holdout=0")
    secret = simulate(*SECURE, *one_round, name="secret", wrap=losing(drop))
    line = read_rounds(tmp_path / "secret")[0]
    counted = exchange in SECURE_EXCHANGES[3:]  # its masked update had arrived by then
    assert ("001" in line["survivors"]) is counted
    assert line["secure"]["summed"] == len(line["survivors"]) == (5 if counted else 4)
    absent = losing(lambda client, request: not counted and client == "001")
    clear = simulate(*CLEAR_RING, *one_round, name="clear", wrap=absent)
    assert secret["adapter_digest"] == clear["adapter_digest"]


def test_a_round_that_loses_too_many_aborts_and_the_next_one_runs(simulate: Simulate, tmp_path: Path) -> None:
    def drop(client: str, request: Request) -> bool:
        return request.group == "2" and request.action == SECURE_EXCHANGES[4]

    summary = simulate(*SECURE, "federation.rounds=3", wrap=losing(drop))
    first, second, third = read_rounds(tmp_path / "run")
    assert first["secure"]
    assert third["secure"]
    assert second["secure"] is None
    assert "revealed their shares" in second["aborted"]
    assert second["train_loss"] is None
    assert summary["secure_aggregation"]["sums"] == 2


def test_random_dropout_up_to_the_limit_still_gives_an_adapter(simulate: Simulate, tmp_path: Path) -> None:
    simulate(
        *SECURE, "data.clients=10", "federation.clients_per_round=10", "simulation.dropout=0.15", "federation.rounds=3"
    )
    lines = read_rounds(tmp_path / "run")
    assert any(line["secure"] and line["secure"]["summed"] < 10 for line in lines)


def test_the_server_gets_nothing_of_a_client_but_words_that_look_random(simulate: Simulate, tmp_path: Path) -> None:
    answers: list[bytes] = []

    def listening(handler: Handler) -> Handler:
        def handle(client: str, request: Request) -> bytes:
            payload = handler(client, request)
            if request.action == TRAIN:
                answers.append(payload)
            return payload

        return handle

    simulate(*SECURE, "federation.rounds=1", "data.holdout=0", wrap=listening)
    assert len(answers) == 5
    for answer in answers:
        with pytest.raises(Exception, match="TrainReply"):
            decode(answer, TrainReply)
        masked = decode_message(answer, MaskedInput, len(answer))
        for segment in masked.segments:
            if len(segment) > 1000:
                ones = sum(byte.bit_count() for byte in segment) / (8 * len(segment))
                assert abs(ones - 0.5) < 0.02
    (line,) = read_rounds(tmp_path / "run")
    assert all(client["loss"] is None and client["examples"] == 0 for client in line["clients"])
    assert line["train_loss"] > 0


def test_the_ledger_tells_what_every_byte_was_for(simulate: Simulate, tmp_path: Path) -> None:
    summary = simulate(*SECURE)
    lines = read_rounds(tmp_path / "run")
    traffic = summary["traffic"]
    assert set(traffic["up"]) == {"update", "keys", "shares", "votes", "unmasking", "evaluation"}
    assert set(traffic["down"]) == {"adapter", "keys", "shares", "votes", "unmasking", "evaluation"}
    assert sum(entry["bytes"] for entry in traffic["up"].values()) == summary["bytes"]["up"]
    assert sum(entry["bytes"] for entry in traffic["down"].values()) == summary["bytes"]["down"]
    assert traffic["up"]["update"]["messages"] == 2 * 5
    for line in lines:
        assert 0 < line["bytes"]["secagg"] < line["bytes"]["up"] + line["bytes"]["down"]
        assert sum(client["bytes_up"] for client in line["clients"]) <= line["bytes"]["up"]


def test_a_device_with_credentials_sends_no_update_in_the_clear(tmp_path: Path, simulate: Simulate) -> None:
    from fedtune.flower.in_process_grid import InProcessGrid
    from fedtune.flower.strategy import AdapterStrategy
    from fedtune.server.simulation.executors import LocalExecutor
    from fedtune.strategies.assembly import assemble

    simulation_context = SimulationContext.begin(small_job(*SECURE), tmp_path / "clients")
    executor = LocalExecutor(simulation_context, {1000 + index: f"00{index}" for index in range(6)})
    lying = small_job(*SECURE, "secure_aggregation.enabled=false", "compression.form=sparse")
    strategy = AdapterStrategy(
        assemble(lying, simulation_context.base, simulation_context.model.layout),
        lambda _: {f"00{index}": 1000 + index for index in range(6)},
    )
    grid = InProcessGrid(executor, range(1000, 1006))
    from fedtune.strategies.federation import initial_state

    (_, record), *_ = strategy.rounds(grid, initial_state(strategy.federation), 1)
    executor.close()
    assert not record.survivors
    assert all("no secure round is open" in (client.dropped or "") for client in record.clients)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("compression.preset=none",), "float32 values cannot be masked"),
        (("compression.form=sparse",), "only a ring can be masked"),
        (("federation.clients_per_round=2",), "a sum hides an update among at least 3"),
        (("secure_aggregation.max_dropout=0.6",), "cannot stand max_corrupt = 0.1 and max_dropout = 0.6"),
        (("data.clients=2", "federation.clients_per_round=0.9"), "of 2 clients a round"),
    ],
)
def test_what_cannot_be_secure_is_told_before_anything_is_written(
    tmp_path: Path, overrides: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(JobError, match=complaint):
        run(small_job(*SECURE, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
