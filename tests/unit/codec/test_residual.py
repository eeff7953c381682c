"""Error feedback: its bookkeeping, and its benefit on a quadratic with a known solution."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.core.codec import Residual, SparseCodec
from fedtune.core.errors import PeerError

COUNT, CLIENTS, ROUNDS, RATE = 200, 4, 250, 0.03


def centres() -> np.ndarray:
    """Returns each client's own optimum; they are far apart, with a small mean."""
    random = np.random.default_rng(0)
    return (random.standard_normal((CLIENTS, COUNT)) * 5 + random.standard_normal(COUNT)).astype(np.float32)


def sparse_distance(feedback: bool) -> float:
    """Returns ‖x - mean‖ / ‖mean‖ of the centres after descent on the mean of ½‖x - centre_i‖², with a tenth sent."""
    goals, codec = centres(), SparseCodec(density=0.1, bits=4)
    everything = np.arange(COUNT)
    model = np.zeros(COUNT, dtype=np.float32)
    residuals = [Residual.empty(COUNT)] * CLIENTS
    for _ in range(ROUNDS):
        received = np.zeros(COUNT, dtype=np.float32)
        for client in range(CLIENTS):
            wanted = residuals[client].compensate(np.float32(RATE) * (goals[client] - model), everything)
            sent = codec.decode(codec.encode(wanted), COUNT)
            received += sent / CLIENTS
            if feedback:
                residuals[client] = residuals[client].carry(wanted - sent, everything)
        model += received
    return float(np.linalg.norm(model - goals.mean(axis=0)) / np.linalg.norm(goals.mean(axis=0)))


def test_a_tenth_of_the_coordinates_finds_the_minimum_with_feedback_and_not_without() -> None:
    assert sparse_distance(feedback=True) < 0.1
    assert sparse_distance(feedback=False) > 0.5


def test_the_residual_is_exactly_what_was_not_sent() -> None:
    update = centres()[0]
    codec = SparseCodec(density=0.1, bits=4)
    everything = np.arange(COUNT)
    sent = codec.decode(codec.encode(update), COUNT)
    residual = Residual.empty(COUNT).carry(update - sent, everything)
    np.testing.assert_allclose(sent + residual.compensate(np.zeros_like(update), everything), update, rtol=1e-6)


def test_a_residual_stays_with_its_parameters_when_a_device_trains_others() -> None:
    residual = Residual.empty(4).carry(np.array([1, 2], dtype=np.float32), np.array([3, 0]))
    assert residual.values.tolist() == [2, 0, 0, 1]
    assert residual.compensate(np.array([10, 10], dtype=np.float32), np.array([1, 3])).tolist() == [10, 11]
    later = residual.carry(np.array([5], dtype=np.float32), np.array([1]))
    assert later.values.tolist() == [2, 5, 0, 1]
    assert residual.values.tolist() == [2, 0, 0, 1]


def test_a_residual_survives_a_restart_bit_for_bit() -> None:
    residual = Residual(centres()[0])
    assert np.array_equal(Residual.from_bytes(residual.to_bytes(), COUNT).values, residual.values)


def test_a_record_that_is_damaged_or_of_another_layout_is_refused() -> None:
    record = Residual(centres()[0]).to_bytes()
    with pytest.raises(PeerError, match="checksum"):
        Residual.from_bytes(record[:-1] + b"\x7f", COUNT)
    with pytest.raises(PeerError, match="200 coordinates"):
        Residual.from_bytes(record, COUNT + 1)
