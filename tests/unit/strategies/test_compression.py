"""Updates travel compressed, up and down, and server and clients end with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.adapter.layout import AdaptedModule, Vector, adapter_digest
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.codec import ExactCodec
from fedtune.core.codec.downlink import FIRST, REMEMBERED_VERSIONS, receive, rounded
from fedtune.core.codec.update_forms import EXACT, FORMS, RING, UpdateForm
from fedtune.core.codec.uplink import Compression, FactorTerms, factor_terms
from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.protocol.messages import Downlink, Uplink, decode
from fedtune.strategies.aggregation import Decoded, Frame, Mean, RingMean, Unpacked
from fedtune.strategies.aggregation.aggregator import Payloads
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.requests import Requests

LAYOUT = LoraLayout((AdaptedModule("q", 24, 16), AdaptedModule("up", 16, 40)), rank=4, alpha=8.0)
SEED = 3


def terms(form: str, rotation: bool = True) -> FactorTerms:
    uplink = Uplink(form, 4, 0.5, False, 8, (1.0,), rotation)
    return FactorTerms(uplink, SEED, 1, "b", LAYOUT.size_b, 1.0)


def aggregation(agreed: FactorTerms) -> Any:
    """Begins an aggregation of the form's payloads."""
    form: UpdateForm = FORMS[agreed.form]
    method = AGGREGATIONS["ffa"]
    aggregator = Unpacked(RingMean(method)) if form == RING else Decoded(Mean(method), form)
    return aggregator.begin(Frame(LAYOUT, "b", LAYOUT.initial(SEED), terms=[agreed]))


def encode(update: Vector, agreed: FactorTerms, private_seed: int) -> bytes:
    return FORMS[agreed.form].encode(update, agreed, private_seed)


def random_update(count: int, seed: int = 0) -> Vector:
    return (0.05 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize("form", ["exact", "dense", "sparse", "ring"])
def test_what_a_payload_carries_is_what_the_server_takes_from_it(form: str) -> None:
    agreed = terms(form)
    update = random_update(agreed.count)
    payload = encode(update, agreed, 7)
    sent = FORMS[form].decode(payload, agreed)
    summed = aggregation(agreed)
    summed.add(Payloads([payload], 5))
    assert summed.finish().update == pytest.approx(sent, abs=1e-6)
    assert np.linalg.norm(update - sent) < np.linalg.norm(update)


def test_the_exact_form_loses_nothing() -> None:
    agreed = terms("exact")
    update = random_update(agreed.count)
    assert EXACT.decode(encode(update, agreed, 7), agreed).tobytes() == update.tobytes()


@pytest.mark.parametrize("form", ["dense", "ring"])
def test_a_stateless_form_is_right_on_average_for_values_far_below_its_step(form: str) -> None:
    agreed = terms(form)
    small, draws = 6e-3, 400
    update = np.full(agreed.count, small, dtype=np.float32)
    update[0] = 0.9  # so that a step is more than twice the other values
    decoded = [FORMS[form].decode(encode(update, agreed, seed), agreed)[1:] for seed in range(draws)]
    spread = float(np.std(decoded))
    assert spread > small, "nearest rounding would lose the small values"
    assert float(np.mean(decoded, dtype=np.float64)) == pytest.approx(small, abs=4 * spread / draws**0.5)
    assert 4 * spread / draws**0.5 < small / 2


@pytest.mark.parametrize("rotation", [True, False])
def test_a_ring_sum_is_the_mean_of_what_the_clients_sent(rotation: bool) -> None:
    agreed = terms("ring", rotation=rotation)
    summed = aggregation(agreed)
    sent = []
    for client in range(3):
        payload = encode(random_update(agreed.count, client), agreed, client)
        summed.add(Payloads([payload], weight=1 + client))
        sent.append(RING.decode(payload, agreed))
    aggregate = summed.finish()
    assert aggregate.update == pytest.approx(np.mean(sent, axis=0), abs=1e-5)
    assert aggregate.clips.keys() == {"b"}


@pytest.mark.parametrize("form", ["exact", "dense", "sparse", "ring"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_payload_is_refused_and_changes_nothing(form: str, data: st.DataObject) -> None:
    agreed = terms(form)
    good = encode(random_update(agreed.count), agreed, 7)
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


def versions(count: int, bits: int = 4) -> list[Vector]:
    """Returns the versions that devices hold over some rounds of alternating training, with ever smaller changes."""
    first = LAYOUT.initial(SEED)
    target, history = first.copy(), [first]
    for number in range(count):
        segment = LAYOUT.segment("b" if number % 2 == 0 else "a")
        target[segment] += random_update(target[segment].size, number) / np.float32(1 + number)
        history.append(rounded(LAYOUT, first, target, bits))
    return history


def requests_for(history: list[Vector]) -> tuple[Requests, Broadcast]:
    """Returns the requests of a round in which client k holds the version k, and its broadcast."""
    broadcast = Broadcast(LAYOUT, history[0], bits=4)
    for number, held in enumerate(history):
        broadcast.sent(f"held-{number}", held)
    return Requests(broadcast, history[-1], lambda adapter, tier: adapter), broadcast


@settings(deadline=None, max_examples=30)
@given(st.integers(1, REMEMBERED_VERSIONS - 1), st.integers(2, 8))
def test_a_client_reaches_the_same_bits_from_whichever_version_it_holds_at_no_more_than_a_new_one_pays(
    rounds: int, bits: int
) -> None:
    history = versions(rounds, bits)
    requests, _ = requests_for(history)
    new = decode(requests.payload("never-seen"), Downlink)
    assert new.basis == FIRST
    assert receive(LAYOUT, history[0], new).tobytes() == history[-1].tobytes()
    for number, basis in enumerate(history):
        adapter = decode(requests.payload(f"held-{number}"), Downlink)
        start = history[0] if adapter.basis == FIRST else basis
        assert receive(LAYOUT, start, adapter).tobytes() == history[-1].tobytes()
        assert sum(map(len, adapter.parts)) <= sum(map(len, new.parts))


def test_a_client_that_was_there_in_the_last_round_pays_less_than_a_new_one() -> None:
    history = versions(7)
    requests, _ = requests_for(history)
    last, new = (decode(requests.payload(name), Downlink) for name in ("held-6", "never-seen"))
    assert last.basis == adapter_digest(history[6])
    assert sum(map(len, last.parts)) < 0.8 * sum(map(len, new.parts))


def test_a_client_that_failed_or_fell_far_behind_starts_from_the_first_adapter() -> None:
    history = versions(REMEMBERED_VERSIONS + 2)
    _, broadcast = requests_for(history)
    assert broadcast.basis("held-1") == FIRST
    assert broadcast.basis(f"held-{len(history) - 1}") == adapter_digest(history[-1])
    broadcast.lost(f"held-{len(history) - 1}")
    assert broadcast.basis(f"held-{len(history) - 1}") == FIRST


def test_without_compression_the_adapter_comes_down_as_it_is() -> None:
    first = LAYOUT.initial(SEED)
    target = first + random_update(LAYOUT.size)
    broadcast = Broadcast(LAYOUT, first, bits=None)
    adapter = broadcast.write(FIRST, broadcast.to_hold(target))
    assert receive(LAYOUT, first, adapter).tobytes() == target.tobytes()


def test_an_adapter_that_is_not_the_one_meant_is_refused() -> None:
    first = LAYOUT.initial(SEED)
    parts = tuple(ExactCodec().encode(half) for half in LAYOUT.parts(first))
    with pytest.raises(PeerError, match="its digest differs"):
        receive(LAYOUT, first, Downlink(FIRST, "f" * 64, parts))


def test_presets_fill_in_what_the_job_leaves_open() -> None:
    clear = "secure_aggregation.enabled=false"
    assert Compression.of(load_job(None)).form == "ring"
    assert Compression.of(load_job(None, [clear])).form == "dense"
    assert Compression.of(load_job(None, [clear, "compression.preset=none"])).form == "exact"
    ring = Compression.of(load_job(None, [clear, "compression.form=ring", "compression.bits=6"]))
    assert (ring.form, ring.bits, ring.density) == ("ring", 6, 1.0)
    sparse = Compression.of(load_job(None, [clear, "compression.form=sparse"]))
    assert 0 < sparse.density < 1
    often, rebased = (Compression.of(load_job(None, [f"federation.rebalance_every={every}"])) for every in (0, 4))
    assert often.downlink_bits == 4
    assert rebased.downlink_bits == 8


@pytest.mark.parametrize("preset", ["none", "balanced", "extreme"])
@pytest.mark.parametrize("secure", ["true", "false"])
def test_no_preset_lets_devices_remember_unless_the_job_asks_for_sparse_updates(preset: str, secure: str) -> None:
    if preset == "none" and secure == "true":
        return
    overrides = [f"compression.preset={preset}", f"secure_aggregation.enabled={secure}"]
    assert not Compression.of(load_job(None, overrides)).error_feedback
    if secure == "false" and preset != "none":
        assert Compression.of(load_job(None, [*overrides, "compression.form=sparse"])).error_feedback
        assert Compression.of(load_job(None, [*overrides, "compression.error_feedback=true"])).error_feedback


def test_terms_that_would_carry_a_residual_into_a_sum_are_refused() -> None:
    uplink = Uplink("ring", 4, 1.0, True, 8, (1.0,), True)
    with pytest.raises(PeerError, match="error feedback in a ring"):
        factor_terms(uplink, LAYOUT, "b", SEED, 1)


@pytest.mark.parametrize("rotation", [None, True, False])
def test_a_job_says_whether_its_rings_rotate_and_every_client_is_told(rotation: bool | None) -> None:
    overrides = ["secure_aggregation.enabled=false", "compression.form=ring"]
    if rotation is not None:
        overrides.append(f"compression.rotation={str(rotation).lower()}")
    wanted = rotation is not False
    assert Compression.of(load_job(None, overrides)).rotation is wanted

    uplink = Uplink("ring", 4, 1.0, False, 8, (1.0,), wanted)
    (agreed,) = factor_terms(uplink, LAYOUT, "b", SEED, 1)
    assert agreed.context().rotation is wanted
