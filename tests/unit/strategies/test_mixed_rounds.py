"""Rounds of mixed ranks without a model: every form gives a mean over owners, and false tiers are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from fedtune.core.adapter.layout import AdaptedModule, Vector
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.adapter.tiers import rank_indices
from fedtune.core.codec.update_forms import FORMS as UPDATE_FORMS
from fedtune.core.codec.update_forms import RING
from fedtune.core.codec.uplink import factor_terms
from fedtune.core.errors import JobError, PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.secure_cohorts import tier_least
from fedtune.core.protocol.messages import Base, TrainReply, TrainRequest, decode, encode
from fedtune.core.seeds import generator
from fedtune.strategies.assembly import Clients, assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.cohorts.tier_assignment import assign_tiers
from fedtune.strategies.federation import initial_state
from fedtune.strategies.round import SAT_OUT, TrainingRound

pytestmark = pytest.mark.usefixtures("paired")

LAYOUT = LoraLayout((AdaptedModule("q", 10, 12), AdaptedModule("up", 8, 6)), rank=8, alpha=2.0)
BASE = Base("demo", "0" * 64, "nf4", 8, 2.0, ("all-linear",), 256)
RANKS = {"ann": 8, "bob": 8, "cid": 4, "dan": 2, "eve": 9}
WEIGHTS = {"ann": 10, "bob": 30, "cid": 20, "dan": 32, "eve": 5}
MIXED = ("secure_aggregation.enabled=false", "adapter.rank=8", "adapter.tiers=[2, 4, 8]", "federation.weight=examples")
EXACT = "compression.preset=none"
FORMS = {
    "exact": (EXACT,),
    "dense": ("compression.bits=8",),
    "sparse": ("compression.form=sparse", "compression.bits=8", "compression.density=1.0"),
    "ring": ("compression.form=ring", "compression.bits=8", "federation.weight=uniform"),
}


def opened(*overrides: str, ranks: Mapping[str, int] = RANKS, state: Any = None) -> TrainingRound:
    federation = assemble(load_job(None, [*MIXED, *overrides]), BASE, LAYOUT, Clients(ranks=ranks.__getitem__))
    broadcast = Broadcast(LAYOUT, LAYOUT.initial(0), bits=None)
    start = state or initial_state(federation)
    round_ = TrainingRound.open(federation, start, sorted(RANKS), broadcast)
    next(round_.exchanges())
    return round_


def trained(name: str, round_: TrainingRound) -> Vector:
    """Returns a client's trained update: of the whole adapter's size, zero at indices that it does not own."""
    request = decode(round_.requests.payload(name), TrainRequest)
    owned = rank_indices(request.job_seed, request.round, LAYOUT.rank, request.tier or LAYOUT.rank)
    update = (0.01 * generator(1, name).standard_normal(LAYOUT.size)).astype(np.float32)
    frozen = np.setdiff1d(np.arange(LAYOUT.rank), owned)
    for lora_a, lora_b in LAYOUT.pairs(update).values():
        lora_a[frozen, :] = 0
        lora_b[:, frozen] = 0
    return update


def answer(name: str, round_: TrainingRound, tier: int | None = None) -> bytes:
    """Returns a client's reply; a `tier` other than the one it was asked for is a lie."""
    request = decode(round_.requests.payload(name), TrainRequest)
    uplink, factors = request.uplink, request.work.factors
    asked = request.tier if tier is None else tier
    terms = factor_terms(uplink, LAYOUT, factors, request.job_seed, request.round, asked)
    update = trained(name, round_)
    parts = [update[LAYOUT.segment(each.factor)][each.indices] for each in terms]
    payloads = [
        UPDATE_FORMS[each.form].encode(part, each, WEIGHTS[name]) for part, each in zip(parts, terms, strict=True)
    ]
    return encode(TrainReply(request.round, WEIGHTS[name], 100, 20, 1.0, 0.1, tuple(payloads)))


def mean_over_owners(round_: TrainingRound) -> np.ndarray:
    """Computes Σ w·Δ / Σ w over the clients whose tier has the index, one index at a time; a ring has no weights."""
    weights = WEIGHTS if round_.federation.form != RING else dict.fromkeys(WEIGHTS, 1)
    order = generator(0, "tiers", round_.number).permutation(LAYOUT.rank)
    mean = np.zeros(LAYOUT.size)
    views = {name: LAYOUT.pairs(trained(name, round_)) for name in RANKS}
    for index in range(LAYOUT.rank):
        owners = [name for name, rank in RANKS.items() if list(order).index(index) < min(rank, LAYOUT.rank)]
        total = sum(weights[name] for name in owners)
        out = LAYOUT.pairs(mean.astype(np.float32))
        for module, (lora_a, lora_b) in out.items():
            lora_a[index] = sum(weights[n] / total * views[n][module][0][index] for n in owners)
            lora_b[:, index] = sum(weights[n] / total * views[n][module][1][:, index] for n in owners)
        mean = np.concatenate([p.reshape(-1) for p in [*(a for a, _ in out.values()), *(b for _, b in out.values())]])
    return mean


@pytest.mark.parametrize("aggregation", ["fedavg", "alternating", "ffa"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_to_the_mean_over_each_index_s_owners(form: str, aggregation: str) -> None:
    round_ = opened(*FORMS[form], f"federation.aggregation={aggregation}")
    for name in RANKS:
        round_.take_in(name, answer(name, round_))
    after, record = round_.close()
    assert record.aborted is None
    assert [client.dropped for client in record.clients] == [None] * 5
    assert [client.rank for client in record.clients] == [8, 8, 4, 2, 8]
    wanted = mean_over_owners(round_)
    for letter in "ab":
        segment = LAYOUT.segment(letter)  # type: ignore[arg-type]
        changed = after.adapter[segment] - round_.state.adapter[segment]
        if letter in round_.plan.factors:
            error = np.linalg.norm(changed - wanted[segment]) / np.linalg.norm(wanted[segment])
            assert error < {"exact": 1e-4, "dense": 0.02, "sparse": 0.02, "ring": 0.1}[form]
        else:
            assert not changed.any()


def test_a_smaller_tier_s_request_and_update_are_its_own() -> None:
    round_ = opened(EXACT)
    requests = {name: decode(round_.requests.payload(name), TrainRequest) for name in RANKS}
    assert [requests[name].tier for name in RANKS] == [8, 8, 4, 2, 8]
    assert len({request.uplink for request in requests.values()}) == 1
    assert requests["dan"].uplink.tiers == (2, 4, 8)
    sizes = {name: len(answer(name, round_)) for name in RANKS}
    assert sizes["dan"] < sizes["cid"] < sizes["ann"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("claimed", [2, 8])
def test_an_update_of_another_tier_than_was_asked_for_is_refused(form: str, claimed: int) -> None:
    round_ = opened(*FORMS[form])
    round_.take_in("cid", answer("cid", round_, claimed))
    round_.take_in("ann", answer("ann", round_))
    _, record = round_.close()
    refused = {client.id: client.dropped for client in record.clients}
    assert "payloads; expected one for each of the factors a (tier 2), a (tier 4)" in (refused["cid"] or "")
    assert refused["ann"] is None


def test_an_index_whose_owners_all_drop_out_stays_as_it_is() -> None:
    for form in FORMS.values():
        round_ = opened(*form, "federation.aggregation=ffa")
        for name in ("cid", "dan"):
            round_.take_in(name, answer(name, round_))
        after, _ = round_.close()
        lora_b = LAYOUT.pairs(after.adapter)["q"][1]
        owned = rank_indices(0, 1, LAYOUT.rank, 4)
        assert lora_b[:, owned].any(axis=0).all()
        assert not lora_b[:, np.setdiff1d(np.arange(8), owned)].any()


def test_a_round_in_which_all_train_everything_is_asked_for_as_if_there_were_no_tiers() -> None:
    alike = opened(EXACT, ranks=dict.fromkeys(RANKS, 8))
    request = decode(alike.requests.payload("ann"), TrainRequest)
    assert (request.tier, request.uplink.tiers) == (0, ())
    assert [each.part for each in alike.plan.terms] == [None, None]


def test_a_client_that_can_train_no_tier_sits_out_and_the_record_says_so() -> None:
    round_ = opened(EXACT, ranks={**RANKS, "dan": 1})
    for name in RANKS:
        round_.take_in(name, answer(name, round_) if name != "dan" else b"")
    _, record = round_.close()
    dan = next(client for client in record.clients if client.id == "dan")
    assert (dan.dropped, dan.rank, dan.tier) == (SAT_OUT, 0, 0)
    assert record.notes == ("clients that cannot train the smallest tier, 2: 1; sat out",)
    assert record.to_json()["notes"]


@pytest.mark.parametrize("aggregation", ["flexlora", "flora"])
def test_means_of_products_keep_what_a_client_did_not_train(aggregation: str) -> None:
    job = load_job(None, [*MIXED, EXACT, f"federation.aggregation={aggregation}"])
    start = initial_state(assemble(job, BASE, LAYOUT))
    adapter = start.adapter + (0.1 * generator(5, "start").standard_normal(LAYOUT.size)).astype(np.float32)
    round_ = opened(EXACT, f"federation.aggregation={aggregation}", state=replace(start, adapter=adapter, held=adapter))
    for name in RANKS:
        round_.take_in(name, answer(name, round_))
    after, _ = round_.close()
    weights = np.array([WEIGHTS[name] for name in RANKS]) / sum(WEIGHTS.values())
    for module in ("q", "up"):
        products = []
        for name in RANKS:
            lora_a, lora_b = LAYOUT.pairs(adapter + trained(name, round_))[module]
            products.append(lora_b.astype(np.float64) @ lora_a)
        mean = np.tensordot(weights, products, axes=1)
        left, values, right = np.linalg.svd(mean, full_matrices=False)
        best = left[:, :8] * values[:8] @ right[:8]
        lora_a, lora_b = LAYOUT.pairs(after.adapter)[module]
        np.testing.assert_allclose(lora_b @ lora_a, best, atol=1e-4)


def test_under_secure_aggregation_a_tier_needs_enough_clients_of_its_own() -> None:
    job = load_job(None, ["adapter.rank=8", "adapter.tiers=[2, 4, 8]"])
    cohort = {f"c{index}": rank for index, rank in enumerate([8, 8, 4, 4, 4, 2, 2, 2, 1])}
    assignment = assign_tiers(sorted(cohort), cohort.__getitem__, job)
    assert list(assignment.trained.values()) == [4, 4, 4, 4, 4, 2, 2, 2, 0]
    assert list(assignment.own.values()) == [8, 8, 4, 4, 4, 2, 2, 2, 0]
    assert assignment.notes[0] == "tier 8: 2 of at least 3 clients; trained as tier 4"
    assert "smallest tier" in assignment.notes[1]
    assert assignment.tiers == (2, 4)


def test_where_more_may_collude_or_vanish_a_tier_needs_more_clients() -> None:
    def least(*overrides: str, cohort: int = 10) -> int:
        return tier_least(load_job(None, list(overrides)).secure_aggregation, cohort)

    assert least() == 3
    assert least("secure_aggregation.max_dropout=0.34") == 4
    assert least(cohort=50) == 9  # five may collude, so seven must be left, and two of nine may vanish


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["federation.aggregation=fedrot"], 'more than one, but federation.aggregation is "fedrot", which turns whole'),
        (
            ["federation.robust=median"],
            'more than one, but federation.robust is "median", which compares whole updates',
        ),
        (["adapter.tiers=[4, 2, 8]"], r"expected numbers that ascend to adapter.rank = 8"),
        (["adapter.tiers=[2, 4]"], r"adapter.tiers is \[2, 4\]; expected numbers that ascend to adapter.rank = 8"),
        (["simulation.ranks=[3, 8]"], r"simulation.ranks has \[3\]; expected only tiers: \[2, 4, 8\]"),
        (["simulation.ranks=[8]", "simulation.fleet=bundled"], "a fleet's plans say what devices train"),
    ],
)
def test_what_cannot_work_with_mixed_ranks_is_told_when_the_job_is_read(overrides: list[str], complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        load_job(None, [*MIXED, *overrides])


def test_where_all_need_the_same_rank_that_is_the_one_tier() -> None:
    assert load_job(None, ["adapter.kind=lora"]).tiers == (4, 8, 16)
    assert load_job(None, []).tiers == (4, 8, 16, 32, 40)
    assert load_job(None, ["adapter.rank=6"]).tiers == (4, 6)
    assert load_job(None, ["federation.aggregation=fedrot"]).tiers == (16,)


@pytest.mark.parametrize(("tiers", "tier"), [((4, 2), 4), ((2, 9), 2), ((2, 2), 2), ((2, 4), 3)])
def test_a_device_refuses_tiers_that_do_not_fit_the_adapter(tiers: tuple[int, ...], tier: int) -> None:
    request = decode(opened(EXACT).requests.payload("ann"), TrainRequest)
    uplink = msgspec.structs.replace(request.uplink, tiers=tiers)
    with pytest.raises(PeerError, match="tiers"):
        factor_terms(uplink, LAYOUT, "ab", 0, 1, tier)
