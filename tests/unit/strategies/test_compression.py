"""Updates travel compressed, up and down, and server and clients end with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Vector, adapter_digest
from fedtune.core.codec import ExactCodec
from fedtune.core.codec.downlink import FIRST, REMEMBERED_VERSIONS, advance, receive
from fedtune.core.codec.update_forms import EXACT, FORMS, RING, UpdateForm
from fedtune.core.codec.uplink import Compression, FactorTerms, factor_terms
from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.protocol.messages import Downlink, Uplink
from fedtune.strategies.aggregation import Decoded, Frame, Mean, RingMean, Unpacked
from fedtune.strategies.aggregation.aggregator import Payloads
from fedtune.strategies.aggregation.payload_sums import WEIGHT
from fedtune.strategies.broadcast import Broadcast

LAYOUT = AdapterLayout((AdaptedModule("q", 24, 16), AdaptedModule("up", 16, 40)), rank=4, alpha=8.0)
SEED = 3


def terms(form: str, density: float = 0.5, rotation: bool = True) -> FactorTerms:
    uplink = Uplink(form, 4, density, True, "examples", 100, 8, (0,), (1.0,), rotation)
    return FactorTerms(uplink, SEED, 1, "b", LAYOUT.size_b, 0, 1.0)


def aggregation(agreed: FactorTerms) -> Any:
    """Begins an aggregation of the form's payloads."""
    form: UpdateForm = FORMS[agreed.form]
    method = AGGREGATIONS["ffa"]
    aggregator = Unpacked(RingMean(method)) if form == RING else Decoded(Mean(method), form)
    return aggregator.begin(Frame(LAYOUT, "b", LAYOUT.initial(SEED), terms=[agreed]))


def encode(update: Vector, agreed: FactorTerms, private_seed: int, weight: float) -> tuple[bytes, Vector]:
    return FORMS[agreed.form].encode(update, agreed, private_seed, weight)


def random_update(count: int, seed: int = 0) -> Vector:
    return (0.05 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize("form", ["exact", "sparse", "ring"])
def test_what_a_payload_carries_is_what_its_client_believes_it_carries(form: str) -> None:
    agreed = terms(form)
    update = random_update(agreed.count)
    payload, sent = encode(update, agreed, 7, 1.0)
    summed = aggregation(agreed)
    summed.add(Payloads([payload], 5))
    assert summed.finish().update == pytest.approx(sent, abs=1e-6)
    assert np.linalg.norm(update - sent) < np.linalg.norm(update)


def test_the_exact_form_loses_nothing() -> None:
    agreed = terms("exact")
    update = random_update(agreed.count)
    payload, sent = encode(update, agreed, 7, 1.0)
    assert EXACT.decode(payload, agreed).tobytes() == update.tobytes() == sent.tobytes()


@pytest.mark.parametrize("rotation", [True, False])
def test_a_ring_sum_is_the_weighted_mean_of_what_the_clients_sent(rotation: bool) -> None:
    agreed = terms("ring", density=1.0, rotation=rotation)
    summed = aggregation(agreed)
    weights = [0.25, 0.5, 1.0]
    sent = []
    for client, weight in enumerate(weights):
        payload, carried = encode(random_update(agreed.count, client), agreed, client, weight)
        summed.add(Payloads([payload], 1))
        sent.append(carried)
    aggregate = summed.finish()
    clips = aggregate.clips
    assert aggregate.update == pytest.approx(np.average(sent, axis=0, weights=weights), abs=1e-5)
    assert clips.keys() == {"b", WEIGHT}
    assert clips[WEIGHT] == pytest.approx(1.25 * 100 * np.mean(weights), rel=1e-4)


@pytest.mark.parametrize("form", ["exact", "sparse", "ring"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_payload_is_refused_and_changes_nothing(form: str, data: st.DataObject) -> None:
    agreed = terms(form)
    good, _ = encode(random_update(agreed.count), agreed, 7, 1.0)
    place = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    bad = good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :]
    summed = aggregation(agreed)
    summed.add(Payloads([good], 1))
    with pytest.raises(PeerError):
        summed.add(Payloads([bad], 1))
    with pytest.raises(PeerError):
        summed.add(Payloads([good[:place]], 1))
    assert summed.finish().update.shape == (agreed.count,)


def versions(count: int) -> list[Vector]:
    """Returns the versions that devices hold over some rounds of alternating training."""
    held = LAYOUT.initial(SEED)
    target = held.copy()
    history = [held]
    for number in range(count):
        factors = "b" if number % 2 == 0 else "a"
        target[LAYOUT.segment(factors)] += random_update(target[LAYOUT.segment(factors)].size, number)  # type: ignore[arg-type]
        held = advance(LAYOUT, held, target, factors, 4)  # type: ignore[arg-type]
        history.append(held)
    return history


def test_a_client_reaches_the_same_bits_from_whichever_version_it_holds() -> None:
    history = versions(6)
    first, last = history[0], history[-1]
    broadcast = Broadcast(LAYOUT, first, exact=False)
    for number, held in enumerate(history):
        broadcast.sent(f"held-{number}", held)
    sizes = []
    for number, basis in enumerate(history):
        adapter = broadcast.write(broadcast.basis(f"held-{number}"), last)
        assert receive(LAYOUT, basis, adapter).tobytes() == last.tobytes()
        sizes.append(sum(map(len, adapter.parts)))
    new = broadcast.write(broadcast.basis("never-seen"), last)
    assert new.basis == FIRST
    assert receive(LAYOUT, first, new).tobytes() == last.tobytes()
    assert sizes[-2] < 4 * LAYOUT.size / 8, "one round's change is small"
    assert sizes[0] < 4 * LAYOUT.size, "even all rounds' change is smaller than float32"


def test_a_client_that_failed_or_fell_far_behind_starts_from_the_first_adapter() -> None:
    history = versions(REMEMBERED_VERSIONS + 2)
    broadcast = Broadcast(LAYOUT, history[0], exact=False)
    for number, held in enumerate(history):
        broadcast.sent(f"held-{number}", held)
    assert broadcast.basis("held-1") == FIRST
    assert broadcast.basis(f"held-{len(history) - 1}") == adapter_digest(history[-1])
    broadcast.lost(f"held-{len(history) - 1}")
    assert broadcast.basis(f"held-{len(history) - 1}") == FIRST


def test_what_has_not_come_down_yet_comes_down_later() -> None:
    held = LAYOUT.initial(SEED)
    target = held.copy()
    target[LAYOUT.segment("b")] += random_update(LAYOUT.size_b)
    gaps = []
    for _ in range(6):
        held = advance(LAYOUT, held, target, "b", 4)
        gaps.append(float(np.linalg.norm(target - held)))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 100


def test_without_compression_the_adapter_comes_down_as_it_is() -> None:
    first = LAYOUT.initial(SEED)
    target = first + random_update(LAYOUT.size)
    held = advance(LAYOUT, first, target, "ab", None)
    adapter = Broadcast(LAYOUT, first, exact=True).write(FIRST, held)
    assert receive(LAYOUT, first, adapter).tobytes() == target.tobytes()


def test_an_adapter_that_is_not_the_one_meant_is_refused() -> None:
    first = LAYOUT.initial(SEED)
    parts = tuple(ExactCodec().encode(half) for half in LAYOUT.halves(first))
    with pytest.raises(PeerError, match="its digest differs"):
        receive(LAYOUT, first, Downlink(FIRST, "f" * 64, parts))  # type: ignore[arg-type]


def test_presets_fill_in_what_the_job_leaves_open() -> None:
    clear = "secure_aggregation.enabled=false"
    assert Compression.of(load_job(None)).form == "ring"
    assert Compression.of(load_job(None, [clear])).form == "sparse"
    assert Compression.of(load_job(None, [clear, "compression.preset=none"])).form == "exact"
    ring = Compression.of(load_job(None, [clear, "compression.form=ring", "compression.bits=6"]))
    assert (ring.form, ring.bits, ring.density) == ("ring", 6, 0.4)
    assert Compression.of(load_job(None, ["compression.error_feedback=false"])).error_feedback is False


@pytest.mark.parametrize("rotation", [None, True, False])
def test_a_job_says_whether_its_rings_rotate_and_every_client_is_told(rotation: bool | None) -> None:
    overrides = ["secure_aggregation.enabled=false", "compression.form=ring"]
    if rotation is not None:
        overrides.append(f"compression.rotation={str(rotation).lower()}")
    wanted = rotation is not False
    assert Compression.of(load_job(None, overrides)).rotation is wanted

    uplink = Uplink("ring", 4, 0.5, True, "examples", 64, 8, (0,), (1.0,), wanted)
    (agreed,) = factor_terms(uplink, LAYOUT, "b", SEED, 1)
    assert agreed.context().rotation is wanted
