"""The downlink: every device holds the same bits, whatever it missed, and fetches a bounded number of them."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.adapter.layout import AdaptedModule, adapter_digest
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.codec import apply, encode_change
from fedtune.core.codec.downlink import FIRST, on_grid, receive
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


def run_of(rounds: int, bits: int = 4, scale: float = 1e-3) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the versions that devices hold while changes become ever smaller, and the server's target at the end."""
    first = np.zeros(COUNT, dtype=np.float32)
    target, versions = first, [first]
    for round_number in range(rounds):
        target = target + change_of(round_number, scale=scale / (1 + round_number))
        versions.append(on_grid(first, target, bits))
    return versions, target


def test_a_device_that_applies_every_change_holds_what_the_server_thinks_it_holds() -> None:
    versions, _ = run_of(10)
    held = versions[0]
    for before, after in itertools.pairwise(versions):
        held = apply(held, encode_change(before, after))
    assert adapter_digest(held) == adapter_digest(versions[-1])


@pytest.mark.parametrize("version", range(10))
def test_a_device_that_missed_rounds_catches_up_to_the_same_bits(version: int) -> None:
    versions, _ = run_of(10)
    data = encode_change(versions[version], versions[-1])
    assert data[KIND_POSITION] == Kind.DELTA
    assert same_bits(apply(versions[version], data), versions[-1])


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_a_change_is_exact_between_any_two_vectors(count: int, seed: int, scale: float) -> None:
    old, held = change_of(seed, count, scale), change_of(seed + 1, count)
    assert same_bits(apply(old, encode_change(old, held)), held)


def test_a_change_keeps_the_sign_of_zero() -> None:
    old, held = np.array([0.0, -0.0], dtype=np.float32), np.array([-0.0, 0.0], dtype=np.float32)
    assert same_bits(apply(old, encode_change(old, held)), held)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(2, 8), st.floats(0.0, 3.0), st.integers(0, 1000))
def test_a_new_device_fetches_no_more_bits_however_long_a_job_has_run_and_however_small_its_changes_become(
    rounds: int, bits: int, decay: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    first = np.zeros(COUNT, dtype=np.float32)
    target = first
    for round_number in range(rounds):
        change = 1e-3 * (1 + round_number) ** -decay * random.standard_normal(COUNT)
        target = target + change.astype(np.float32)
    held = on_grid(first, target, bits)
    step = 6 / (2**bits - 1) / 2**0.5  # of the root mean square, at its finest
    assert 8 * len(encode_change(first, held)) / COUNT < np.log2(1 / step) + 2.05 + 0.4  # the coder's tables at most
    assert np.sqrt(np.mean((held - target) ** 2)) < 0.3 * 2 * step * np.sqrt(np.mean(target**2))


def test_the_step_follows_the_change_and_not_the_value() -> None:
    first = np.ldexp(np.rint(np.ldexp(change_of(0, scale=1.0), 12)), -12).astype(np.float32)
    target = first + change_of(1, scale=1e-4)
    held = on_grid(first, target, 4)
    assert np.linalg.norm(target - held) < 0.2 * np.linalg.norm(target - first)
    assert 8 * len(encode_change(first, held)) < 4.5 * COUNT


def test_what_devices_hold_follows_from_the_target_alone_and_never_strays_further() -> None:
    versions, target = run_of(30)
    assert same_bits(versions[-1], on_grid(versions[0], target, 4))
    assert np.linalg.norm(target - versions[-1]) < 0.2 * np.linalg.norm(target)


def test_while_little_changes_most_values_stay_where_they_are() -> None:
    versions, target = run_of(10)
    after = on_grid(versions[0], target + change_of(11, scale=2e-5), 4)
    assert 8 * len(encode_change(versions[-1], after)) < COUNT < 8 * len(encode_change(versions[0], after))


def test_a_change_of_nothing_costs_next_to_nothing() -> None:
    target = change_of(0)
    assert same_bits(on_grid(target, target, 4), target)
    assert len(encode_change(target, target)) < 40


def test_steps_are_powers_of_two_so_that_versions_stay_on_a_grid() -> None:
    versions, _ = run_of(10)
    smallest = min(float(np.abs(version[version != 0]).min()) for version in versions[1:])
    assert np.log2(smallest) == np.rint(np.log2(smallest))
    multiples = versions[-1].astype(np.float64) / smallest
    assert np.array_equal(multiples, np.rint(multiples))


def test_empty_and_single_factors_work() -> None:
    for count in (0, 1):
        first, target = np.zeros(count, dtype=np.float32), np.ones(count, dtype=np.float32)
        held = on_grid(first, target, 4)
        assert same_bits(apply(first, encode_change(first, held)), held)


def test_another_adapter_is_noticed_by_its_digest() -> None:
    layout = LoraLayout((AdaptedModule("q", 8, 6),), rank=4, alpha=8.0)
    held = change_of(0, layout.size)
    other = held.copy()
    other[5] = np.nextafter(other[5], np.float32(1))
    halves = layout.parts(np.zeros_like(held)), layout.parts(held)
    parts = tuple(encode_change(old, new) for old, new in zip(*halves, strict=True))
    sent = Downlink(FIRST, adapter_digest(held), parts)
    assert same_bits(receive(layout, np.zeros_like(held), sent), held)
    meant = msgspec.structs.replace(sent, digest=adapter_digest(other))
    with pytest.raises(PeerError, match="digest"):
        receive(layout, np.zeros_like(held), meant)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_target_that_is_not_finite_is_refused_on_the_server(bad: float) -> None:
    target = change_of(0)
    target[0] = bad
    with pytest.raises(UpdateError):
        on_grid(change_of(1), target, 4)


def test_a_payload_that_leads_to_infinity_is_refused() -> None:
    body = encode_step(np.float32(MAX_STEP)) + encode_levels(np.full(3, MAX_LEVEL, dtype=np.int32))
    with pytest.raises(PeerError, match="infinity"):
        apply(np.full(3, 3.4e38, dtype=np.float32), frame(Kind.DELTA, 3, body))


def test_a_damaged_delta_is_refused() -> None:
    data = encode_change(*run_of(1)[0])
    with pytest.raises(PeerError, match="checksum"):
        apply(np.zeros(COUNT, np.float32), data[:-1] + bytes([data[-1] ^ 1]))
