"""The downlink: every device holds the same bits, whatever it missed, and no change is lost permanently."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, adapter_digest
from fedtune.core.codec import ExactCodec, apply, encode_catch_up, encode_delta, encode_refresh
from fedtune.core.codec.downlink import FIRST, receive
from fedtune.core.codec.entropy import encode_levels
from fedtune.core.codec.quantization import MAX_LEVEL, MAX_STEP
from fedtune.core.codec.sparse import encode_step
from fedtune.core.codec.wire import Kind, frame
from fedtune.core.errors import PeerError, UpdateError
from fedtune.core.protocol.messages import Downlink

COUNT = 3000
KIND_POSITION = 3


def change_of(seed: int, count: int = COUNT, scale: float = 1e-3) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_t(4, count)).astype(np.float32)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return np.array_equal(left.view(np.uint32), right.view(np.uint32))


def run_of(rounds: int, bits: int = 3, scale: float = 1e-3) -> tuple[list[np.ndarray], list[bytes], np.ndarray]:
    """Returns the versions that the devices held, the deltas between them, and the server's target at the end."""
    target = np.zeros(COUNT, dtype=np.float32)
    versions, deltas = [target], []
    for round_number in range(rounds):
        target = target + change_of(round_number, scale=scale / (1 + round_number))
        deltas.append(encode_delta(versions[-1], target, bits))
        versions.append(apply(versions[-1], deltas[-1]))
    return versions, deltas, target


def test_a_device_that_applies_every_delta_holds_what_the_server_thinks_it_holds() -> None:
    versions, deltas, _ = run_of(10)
    held = versions[0]
    for delta in deltas:
        held = apply(held, delta)
    assert adapter_digest(held) == adapter_digest(versions[-1])


@pytest.mark.parametrize("version", range(10))
def test_a_device_that_missed_rounds_catches_up_to_the_same_bits(version: int) -> None:
    versions, _, _ = run_of(10)
    data = encode_catch_up(versions[version], versions[-1])
    assert data[KIND_POSITION] == Kind.DELTA
    assert same_bits(apply(versions[version], data), versions[-1])
    assert len(data) < 2 * COUNT


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_a_catch_up_is_exact_between_any_two_vectors(count: int, seed: int, scale: float) -> None:
    old, held = change_of(seed, count, scale), change_of(seed + 1, count)
    assert same_bits(apply(old, encode_catch_up(old, held)), held)


def test_a_catch_up_keeps_the_sign_of_zero() -> None:
    old, held = np.array([0.0, -0.0], dtype=np.float32), np.array([-0.0, 0.0], dtype=np.float32)
    assert same_bits(apply(old, encode_catch_up(old, held)), held)


def test_what_a_delta_leaves_out_comes_across_later() -> None:
    target = change_of(0)
    held = np.zeros_like(target)
    errors = []
    for _ in range(12):
        held = apply(held, encode_delta(held, target, bits=2))
        errors.append(float(np.linalg.norm(target - held) / np.linalg.norm(target)))
    assert errors[0] > 0.2
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("scale", 2.0 ** np.linspace(0, 1, 9))
def test_a_delta_of_what_a_delta_left_out_is_never_empty(scale: float) -> None:
    target = (scale * np.random.default_rng(0).uniform(-1, 1, COUNT)).astype(np.float32)
    held = np.zeros_like(target)
    assert not same_bits(apply(held, encode_delta(held, target, bits=2)), held)


def test_errors_do_not_add_up_over_rounds() -> None:
    versions, _, target = run_of(30, bits=2)
    assert np.linalg.norm(target - versions[-1]) < 0.1 * np.linalg.norm(target)


def test_a_delta_between_equals_costs_next_to_nothing() -> None:
    target = change_of(0)
    held = apply(np.zeros_like(target), ExactCodec().encode(target))
    data = encode_delta(held, target, 4)
    assert len(data) < 40
    assert same_bits(apply(held, data), target)


def test_a_refresh_replaces_whatever_was_held_at_eight_bits() -> None:
    target = change_of(0)
    data = encode_refresh(target)
    fresh = apply(np.zeros_like(target), data)
    assert same_bits(apply(change_of(1), data), fresh)
    assert np.linalg.norm(target - fresh) < 0.01 * np.linalg.norm(target)
    assert len(data) < 1.1 * COUNT


def test_steps_are_powers_of_two_so_that_versions_stay_on_a_grid() -> None:
    versions, _, _ = run_of(10)
    smallest = min(float(np.abs(version[version != 0]).min()) for version in versions[1:])
    grid = 2.0 ** np.floor(np.log2(smallest))
    multiples = versions[-1].astype(np.float64) / (grid / 64)
    assert np.array_equal(multiples, np.rint(multiples))


def test_empty_and_single_factors_work() -> None:
    for count in (0, 1):
        held, target = np.zeros(count, dtype=np.float32), np.ones(count, dtype=np.float32)
        assert apply(held, encode_delta(held, target, 4)).shape == (count,)
        assert apply(held, encode_refresh(target)).shape == (count,)


def test_another_adapter_is_noticed_by_its_digest() -> None:
    layout = AdapterLayout((AdaptedModule("q", 8, 6),), rank=4, alpha=8.0)
    held = change_of(0, layout.size)
    other = held.copy()
    other[5] = np.nextafter(other[5], np.float32(1))
    halves = layout.halves(np.zeros_like(held)), layout.halves(held)
    parts = tuple(encode_catch_up(old, new) for old, new in zip(*halves, strict=True))
    sent = Downlink(FIRST, adapter_digest(held), parts)  # type: ignore[arg-type]
    assert same_bits(receive(layout, np.zeros_like(held), sent), held)
    meant = msgspec.structs.replace(sent, digest=adapter_digest(other))
    with pytest.raises(PeerError, match="digest"):
        receive(layout, np.zeros_like(held), meant)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_target_that_is_not_finite_is_refused_on_the_server(bad: float) -> None:
    target = change_of(0)
    target[0] = bad
    with pytest.raises(UpdateError):
        encode_delta(change_of(1), target, 4)
    with pytest.raises(UpdateError):
        encode_refresh(target)


def test_a_payload_that_leads_to_infinity_is_refused() -> None:
    body = encode_step(np.float32(MAX_STEP)) + encode_levels(np.full(3, MAX_LEVEL, dtype=np.int32))
    with pytest.raises(PeerError, match="infinity"):
        apply(np.full(3, 3.4e38, dtype=np.float32), frame(Kind.DELTA, 3, body))


def test_a_damaged_delta_is_refused() -> None:
    _, deltas, _ = run_of(1)
    with pytest.raises(PeerError, match="checksum"):
        apply(np.zeros(COUNT, np.float32), deltas[0][:-1] + bytes([deltas[0][-1] ^ 1]))
