"""The state that a client keeps between rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedtune.client.client_store import KEPT_RESIDUALS, ClientStore
from fedtune.core.adapter.layout import adapter_digest
from fedtune.core.codec import Residual
from fedtune.core.codec.downlink import REMEMBERED_VERSIONS


def residual(value: float) -> Residual:
    return Residual(np.full(4, value, dtype=np.float32))


def held(store: ClientStore, before_round: int, client: str = "ann", factor: str = "b") -> float:
    return float(store.residual(client, factor, 4, before_round).values[0])


def test_a_residual_survives_a_restart(tmp_path: Path) -> None:
    ClientStore(tmp_path).keep_residual("ann", "b", 3, residual(1.5))
    assert held(ClientStore(tmp_path), before_round=4) == 1.5
    assert held(ClientStore(tmp_path), before_round=9) == 1.5, "a client that misses rounds keeps its residual"


def test_clients_and_factors_have_residuals_of_their_own(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.keep_residual("ann", "b", 1, residual(1.0))
    store.keep_residual("../ann", "b", 1, residual(2.0))
    store.keep_residual("ann", "a", 1, residual(3.0))
    assert held(store, 2) == 1.0
    assert held(store, 2, client="../ann") == 2.0
    assert held(store, 2, factor="a") == 3.0
    assert held(store, 2, client="bob") == 0.0
    assert {path.name for path in tmp_path.iterdir()} == {"residuals"}


def test_a_repeated_round_starts_from_what_was_held_before_it(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for number in (1, 2, 3):
        store.keep_residual("ann", "b", number, residual(float(number)))
    assert held(store, before_round=3) == 2.0
    store.keep_residual("ann", "b", 2, residual(20.0))
    assert held(store, before_round=9) == 20.0, "rounds after the repeated one have not happened"


def test_only_the_last_few_residuals_are_kept(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for number in range(1, 10):
        store.keep_residual("ann", "b", number, residual(float(number)))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == KEPT_RESIDUALS


def test_a_damaged_residual_is_an_empty_one(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.keep_residual("ann", "b", 1, residual(1.0))
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    assert held(store, 2) == 0.0
    assert store.residual("ann", "b", 7, 2).values.tolist() == [0.0] * 7


def test_versions_of_the_adapter_are_kept_by_what_they_are(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    vectors = [np.full(4, value, dtype=np.float32) for value in range(3 * REMEMBERED_VERSIONS)]
    for vector in vectors:
        store.keep_adapter(adapter_digest(vector), vector)
    found = store.adapter(adapter_digest(vectors[-1]), 4)
    assert found is not None
    assert found.tolist() == vectors[-1].tolist()
    assert store.adapter(adapter_digest(vectors[0]), 4) is None
    assert store.adapter("0" * 64, 4) is None
