"""Every aggregator agrees with a reference written from its formula, and deviates from the others as expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.core.adapter.basis import align_update
from fedtune.core.adapter.layout import AdaptedModule, Vector
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.errors import JobError, UpdateError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.methods import AGGREGATIONS
from fedtune.core.job.settings import FederationSettings
from fedtune.strategies.aggregation import (
    NOTHING,
    Aggregator,
    Clipped,
    CoordinateMedian,
    Frame,
    Mean,
    MultiKrum,
    ProductMean,
    Robust,
    TrimmedMean,
    Update,
    update_aggregator,
)
from fedtune.strategies.aggregation.products import RESIDUAL, factors_of

LAYOUT = LoraLayout((AdaptedModule("q", 7, 5), AdaptedModule("v", 6, 9)), rank=3, alpha=2.0)
NAMES = ("fedavg", "fedrot", "alternating", "ffa", "flexlora", "flora")
Factors = dict[str, tuple[np.ndarray, np.ndarray]]
FEDAVG = Mean(AGGREGATIONS["fedavg"])


def named(name: Any) -> Aggregator[Update]:
    return update_aggregator(FederationSettings(aggregation=name))


def begin(aggregator: Aggregator[Update], factors: Any, adapter: Vector | None = None, state: Any = NOTHING) -> Any:
    """Begins the aggregation of a round that trains these factors."""
    return aggregator.begin(Frame(LAYOUT, factors, LAYOUT.initial(0) if adapter is None else adapter, state))


def cohort(factors: str, clients: int = 6, seed: int = 0) -> tuple[Vector, list[Vector], list[int]]:
    """Draws an adapter, updates of the named factors, and weights."""
    random = np.random.default_rng(seed)
    adapter = random.normal(0, 0.3, LAYOUT.size).astype(np.float32)
    size = adapter[LAYOUT.segment(factors)].size  # type: ignore[arg-type]
    updates = [random.normal(0, 0.2, size).astype(np.float32) for _ in range(clients)]
    return adapter, updates, [int(weight) for weight in random.integers(1, 50, clients)]


def aggregate(
    aggregator: Aggregator[Update], order: Any = None, state: Any = None, seed: int = 0
) -> tuple[Vector, Vector, Any]:
    """Returns the adapter before and after a round, and the state after it."""
    factors = aggregator.method.factors(1)
    adapter, updates, weights = cohort(factors, seed=seed)
    aggregation = begin(aggregator, factors, adapter, state or {})
    for index in order if order is not None else range(len(updates)):
        aggregation.add(Update(updates[index], weights[index]))
    aggregate = aggregation.finish()
    after = adapter.copy()
    after[LAYOUT.segment(factors)] += aggregate.update
    return adapter, after, aggregate.state


def matrices(vector: Vector) -> Factors:
    """Splits the flat vector by hand: all A factors row by row, then all B factors."""
    named, place = {}, 0
    shapes = [("q", 3, 7), ("v", 3, 6), ("q", 5, 3), ("v", 9, 3)]
    parts = []
    for name, rows, columns in shapes:
        parts.append((name, vector[place : place + rows * columns].reshape(rows, columns).astype(np.float64)))
        place += rows * columns
    for (name, lora_a), (_, lora_b) in zip(parts[:2], parts[2:], strict=True):
        named[name] = (lora_a, lora_b)
    return named


def mean_products(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Computes Σ p·B_i·A_i, one client after the other."""
    factors = named(name).method.factors(1)
    adapter, updates, weights = cohort(factors, seed=seed)
    shares = np.array(weights) / sum(weights)
    total: dict[str, np.ndarray] = {"q": np.zeros((5, 7)), "v": np.zeros((9, 6))}
    for update, share in zip(updates, shares, strict=True):
        own = adapter.copy()
        own[LAYOUT.segment(factors)] += update
        for module, (lora_a, lora_b) in matrices(own).items():
            total[module] = total[module] + share * np.dot(lora_b, lora_a)
    return total


def deviation(name: str) -> float:
    """Computes ‖Σ p·B_i·A_i - B·A‖, with the residual added if there is one."""
    _, after, state = aggregate(named(name))
    wanted, square, place = mean_products(name), 0.0, 0
    residual = state.get(RESIDUAL)
    for module, (lora_a, lora_b) in matrices(after).items():
        got = lora_b @ lora_a
        if residual is not None:
            got = got + residual[place : place + got.size].reshape(got.shape)
            place += got.size
        square += float(np.square(wanted[module] - got).sum())
    return float(square**0.5)


@pytest.mark.parametrize("name", ["alternating", "ffa", "flora"])
def test_exact_methods_have_no_deviation(name: str) -> None:
    assert deviation(name) < 1e-5


@pytest.mark.parametrize("name", ["fedavg", "fedrot"])
def test_averaging_both_factors_deviates(name: str) -> None:
    assert deviation(name) > 0.1


@pytest.mark.parametrize("name", ["fedavg", "fedrot", "alternating", "ffa"])
def test_linear_aggregators_are_the_weighted_mean_of_what_is_trained(name: str) -> None:
    aggregator = named(name)
    segment = LAYOUT.segment(aggregator.method.factors(1))
    adapter, updates, weights = cohort(aggregator.method.factors(1))
    wanted = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True)) / sum(weights)
    before, after, state = aggregate(aggregator)
    np.testing.assert_allclose(after[segment] - before[segment], wanted, atol=1e-6)
    assert state == {}
    untouched = np.delete(np.arange(LAYOUT.size), np.arange(LAYOUT.size)[segment])
    assert np.array_equal(after[untouched], adapter[untouched])


def test_what_each_trains() -> None:
    trained = {name: "".join(f"{named(name).method.factors(number)} " for number in (1, 2, 3)) for name in NAMES}
    assert trained == {
        "fedavg": "ab ab ab ",
        "fedrot": "ab ab ab ",
        "alternating": "b a b ",
        "ffa": "b b b ",
        "flexlora": "ab ab ab ",
        "flora": "ab ab ab ",
    }


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_product_means_are_the_best_of_their_rank(name: str) -> None:
    _, after, _ = aggregate(named(name))
    wanted = mean_products(name)
    for module, (lora_a, lora_b) in matrices(after).items():
        # The best approximation (Eckart and Young), by the eigenvectors of MᵀM rather than an SVD.
        values, vectors = np.linalg.eigh(wanted[module].T @ wanted[module])
        top = vectors[:, np.argsort(values)[::-1][:3]]
        np.testing.assert_allclose(lora_b @ lora_a, wanted[module] @ top @ top.T, atol=1e-5)
        np.testing.assert_allclose(lora_a @ lora_a.T, lora_b.T @ lora_b, atol=1e-5)


def test_floras_residual_is_added_before_the_next_cut() -> None:
    flora = ProductMean(AGGREGATIONS["flora"])
    _, _, state = aggregate(flora)
    _, second, again = aggregate(flora, state=state, seed=1)
    wanted, place = mean_products("flora", seed=1), 0
    for module, (lora_a, lora_b) in matrices(second).items():
        size = wanted[module].size
        carried, rest = (part[RESIDUAL][place : place + size].reshape(wanted[module].shape) for part in (state, again))
        np.testing.assert_allclose(lora_b @ lora_a + rest, wanted[module] + carried, atol=1e-5)
        assert np.abs(carried).max() > 0.01
        place += size


def test_a_product_of_less_rank_leaves_fresh_rows_to_train() -> None:
    left, right = np.arange(1.0, 6.0)[:, None], np.ones((1, 7))
    lora_a, lora_b = factors_of(left @ right, 3)
    np.testing.assert_allclose(lora_b @ lora_a, left @ right)
    assert np.array_equal(lora_b[:, 1:], np.zeros((5, 2)))
    gram = lora_a @ lora_a.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    assert np.diag(gram)[1:] == pytest.approx(1 / 3)


def test_fedrot_turns_a_client_towards_the_others_and_changes_no_product() -> None:
    adapter, _, _ = cohort("ab")
    random = np.random.default_rng(9)
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    update = np.empty_like(adapter)
    turned = adapter.copy()
    for (lora_a, lora_b), (into_a, into_b) in zip(
        LAYOUT.pairs(adapter).values(), LAYOUT.pairs(turned).values(), strict=True
    ):
        into_a[:], into_b[:] = turn.T @ lora_a, lora_b @ turn
    update = turned - adapter
    np.testing.assert_allclose(align_update(LAYOUT, adapter, update), 0, atol=1e-5)
    noise = random.normal(0, 0.1, LAYOUT.size).astype(np.float32)
    aligned = align_update(LAYOUT, adapter, update + noise)
    assert np.linalg.norm(aligned) < np.linalg.norm(update + noise)
    trained, sent = matrices(adapter + update + noise), matrices(adapter + aligned)
    for module in trained:
        np.testing.assert_allclose(
            sent[module][1] @ sent[module][0], trained[module][1] @ trained[module][0], atol=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_order_of_arrival_does_not_change_the_aggregate(name: str) -> None:
    _, forwards, _ = aggregate(named(name))
    _, backwards, _ = aggregate(named(name), order=range(5, -1, -1))
    if name in ("flexlora", "flora"):
        for module, (lora_a, lora_b) in matrices(forwards).items():
            other_a, other_b = matrices(backwards)[module]
            np.testing.assert_allclose(lora_b @ lora_a, other_b @ other_a, atol=1e-6)
    else:
        assert forwards.tobytes() == backwards.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_cannot_be_added_is_refused_and_changes_nothing(name: str) -> None:
    aggregator = named(name)
    adapter, updates, _ = cohort(aggregator.method.factors(1))
    clean, disturbed = (begin(aggregator, aggregator.method.factors(1), adapter) for _ in range(2))
    clean.add(Update(updates[0], 1))
    disturbed.add(Update(updates[0], 1))
    for bad, weight in (
        (np.full_like(updates[0], np.nan), 1),
        (updates[0] * 1e9, 1),
        (updates[0][:-1], 1),
        (updates[0], 0),
    ):
        with pytest.raises(UpdateError):
            disturbed.add(Update(bad, weight))
    assert clean.finish().update.tobytes() == disturbed.finish().update.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_without_updates_nothing_changes(name: str) -> None:
    aggregator = named(name)
    adapter, _, _ = cohort("ab")
    assert not begin(aggregator, aggregator.method.factors(1), adapter).finish().update.any()


def reduced(rule: Any, updates: list[Vector], order: Any = None) -> Vector:
    aggregation = begin(Robust(FEDAVG.method, rule), "ab")
    for index in order if order is not None else range(len(updates)):
        aggregation.add(Update(updates[index], 1 + index))
    update: Vector = aggregation.finish().update
    return update


def test_the_median_and_the_trimmed_mean_are_those_of_every_coordinate() -> None:
    _, updates, _ = cohort("ab", clients=7)
    median, trimmed = reduced(CoordinateMedian(), updates), reduced(TrimmedMean(0.3), updates)
    for place in range(0, LAYOUT.size, 11):
        values = sorted(float(update[place]) for update in updates)
        assert median[place] == pytest.approx(values[3])
        assert trimmed[place] == pytest.approx(sum(values[2:5]) / 3, rel=1e-5)


def test_multi_krum_keeps_those_that_lie_closest() -> None:
    _, updates, _ = cohort("ab", clients=9)
    result = reduced(MultiKrum(0.2), updates)
    b = slice(LAYOUT.size_a, None)
    scores = []
    for own in range(9):
        distances = sorted(
            sum((float(x) - float(y)) ** 2 for x, y in zip(updates[own][b], updates[other][b], strict=True))
            for other in range(9)
            if other != own
        )
        scores.append((sum(distances[: 9 - 2 - 2]), own))
    kept = [own for _, own in sorted(scores)[:7]]
    wanted = sum((1 + own) * updates[own].astype(np.float64) for own in kept) / sum(1 + own for own in kept)
    np.testing.assert_allclose(result, wanted, atol=1e-6)


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(0.3), MultiKrum(0.3)])
def test_a_fifth_of_hostile_clients_moves_a_robust_aggregate_little_and_the_mean_far(rule: Any) -> None:
    _, honest, _ = cohort("ab", clients=8)
    base = np.full_like(honest[0], 0.5)
    updates = [base + 0.1 * update for update in honest] + [np.full_like(base, -3.0)] * 2
    assert np.abs(reduced(rule, updates) - 0.5).mean() < 0.05
    mean = begin(FEDAVG, "ab")
    for update in updates:
        mean.add(Update(update, 1))
    assert np.abs(mean.finish().update - 0.5).mean() > 0.5
    assert reduced(rule, updates[:1]).tobytes() == updates[0].tobytes()


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(0.3)])
def test_rules_do_not_depend_on_the_order_of_arrival(rule: Any) -> None:
    _, updates, _ = cohort("ab", clients=7)
    assert reduced(rule, updates).tobytes() == reduced(rule, updates, range(6, -1, -1)).tobytes()


def test_long_updates_are_scaled_to_the_clip_and_short_ones_left() -> None:
    _, updates, _ = cohort("ab", clients=2)
    updates[1] = updates[1] * np.float32(1e-3)
    aggregation = begin(Clipped(FEDAVG, 0.5), "ab")
    for update in updates:
        aggregation.add(Update(update, 1))
    wanted = (updates[0] * 0.5 / np.linalg.norm(updates[0]) + updates[1]) / 2
    np.testing.assert_allclose(aggregation.finish().update, wanted, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["federation.aggregation=flexlora", "compression.form=ring"], "multiplies each client's factors"),
        (["federation.aggregation=flora", "compression.form=ring"], "multiplies each client's factors"),
        (["federation.robust=median", "compression.form=ring"], "compares single updates"),
        (["federation.clip_norm=1.0", "compression.form=ring"], "clipped on the devices already"),
        (["federation.weight=examples", "compression.form=ring"], 'false one could not be noticed; expected "uniform"'),
        (
            ["secure_aggregation.enabled=false", "federation.aggregation=flexlora"],
            'expected compression.preset = "none"',
        ),
        (
            ["federation.aggregation=flora", "compression.preset=none", "federation.server_optimizer=adam"],
            'expected federation.server_optimizer = "none"',
        ),
        (
            ["federation.aggregation=flora", "compression.preset=none", "federation.robust=median"],
            'expected federation.robust = "none"',
        ),
        (
            [
                "secure_aggregation.enabled=false",
                "federation.aggregation=flora",
                "compression.preset=none",
                'export.formats=["int4"]',
            ],
            'expected federation.aggregation = "flexlora", or export.formats = []',
        ),
        (["federation.server_learning_rate=0.5"], 'federation.server_optimizer is "none"'),
        (["federation.robust_share=0.5"], "federation.robust_share"),
        (["federation.aggregation=fedprox"], "federation.aggregation"),
    ],
)
def test_what_cannot_be_secure_or_contradicts_itself_is_refused_when_the_job_is_read(
    overrides: list[str], complaint: str
) -> None:
    with pytest.raises(JobError) as caught:
        load_job(None, overrides)
    assert complaint in str(caught.value)


def test_a_job_names_its_aggregator_and_what_goes_around_it() -> None:
    robust = ["federation.robust=multi-krum", "federation.robust_share=0.1", "federation.clip_norm=2.0"]
    job = load_job(None, ["secure_aggregation.enabled=false", *robust])
    assert update_aggregator(job.federation) == Clipped(Robust(FEDAVG.method, MultiKrum(0.1)), 2.0)
    assert set(AGGREGATIONS) == set(NAMES), "every aggregation that a job may name is declared"


# -- The linear model of RoLoRA (Chen et al. 2024), theorem 4.5 and proposition 4.6 ----------------------------------


def linear_model(train_a: bool, rounds: int) -> list[float]:
    """Returns ‖B·A - b·aᵀ‖²/‖b·aᵀ‖² by round, for a rank-1 target in d = 20 under each client's own noise."""
    dimension, clients = 20, 10
    random = np.random.default_rng(3)
    target_a = random.normal(size=dimension)
    target_a /= np.linalg.norm(target_a)
    target_b = random.normal(size=dimension)
    lora_a = random.normal(size=dimension)
    lora_a /= np.linalg.norm(lora_a)
    lora_b = np.zeros(dimension)
    errors = []
    layout = LoraLayout((AdaptedModule("x", dimension, dimension),), rank=1, alpha=1.0)
    aggregator = named("alternating" if train_a else "ffa")
    for number in range(1, rounds + 1):
        factors = aggregator.method.factors(number)
        aggregation: Any = aggregator.begin(Frame(layout, factors, layout.initial(0)))
        for client in range(clients):
            design = np.random.default_rng([number, client]).normal(size=(60, dimension))
            answers = design @ np.outer(target_a, target_b)
            if factors == "b":  # least squares for B with A fixed
                seen = design @ lora_a
                update = answers.T @ seen / (seen @ seen) - lora_b
            else:
                wanted = answers @ lora_b / (lora_b @ lora_b)
                update = np.linalg.lstsq(design, wanted, rcond=None)[0] - lora_a
            aggregation.add(Update(np.clip(update, -10, 10).astype(np.float32), 1))
        step = aggregation.finish().update
        if factors == "b":
            lora_b = lora_b + step
        else:
            lora_a = lora_a + step
            lora_a = lora_a / np.linalg.norm(lora_a)
        errors.append(
            float(np.square(np.outer(lora_b, lora_a) - np.outer(target_b, target_a)).sum() / (target_b @ target_b))
        )
    return errors


def test_a_frozen_a_plateaus_where_alternation_goes_on_to_decay() -> None:
    frozen, alternating = linear_model(False, 12), linear_model(True, 12)
    cosine = 1 - frozen[-1]
    assert frozen[-1] > 0.5  # a share of 1 - r/d of the target lies outside a random row space
    assert abs(frozen[-1] - frozen[3]) < 0.05
    assert cosine < 0.5
    assert alternating[-1] < 1e-3 < frozen[-1]
