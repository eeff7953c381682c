"""Clients trained side by side have the updates of clients trained one after another, up to rounding.

The tolerances are relative to the norm of an update in float32: 1e-3 under AdamW, and 0.05 under Muon, whose own
products are in bfloat16. Updates of two clients differ by far more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_tasks import changed, local_task

from fedtune.client.torch.many_optimizers import ManyMuon, orthogonal
from fedtune.client.torch.side_by_side import reason_against, train_together
from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import ClientTask, LocalResult, LocalTask
from fedtune.core.errors import UpdateError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.examples import Example, prepare
from fedtune.data.records import Record
from fedtune.model import loss
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.side_by_side_layers import ClientRows, MixedRowsError, PaddedRows, Stretches

MakeModel = Callable[..., Path]
WITHOUT_DROPOUT = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
TOLERANCE = {"adamw": 1e-3, "muon": 0.05}
TASK = local_task(seed=5, learning_rate=5e-3, local_steps=3, batch_tokens=64)
CORE = AdapterSettings("core", 8)
LORA = AdapterSettings(rank=4)


def load(make_model: MakeModel, architecture: str = "llama", settings: AdapterSettings = LORA) -> AdaptedModel:
    directory = make_model(architecture, **WITHOUT_DROPOUT.get(architecture, {}))
    return adapt(load_base(ModelSettings(str(directory)), precision="fp32"), settings)


@pytest.fixture(autouse=True, params=["padded", "without padding"])
def padding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has every pass computed in one of the two ways, whatever would be faster; most tests look at both."""
    monkeypatch.setattr(loss, "_LEAST_SAVED", 10**9 if request.param == "padded" else -(10**9))
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def llama(make_model: MakeModel) -> AdaptedModel:
    return load(make_model)


def examples_of(model: AdaptedModel, client: int) -> list[Example]:
    """Returns a client's examples; those of later clients are fewer and longer."""
    records = [
        Record(f" {'lamp ' * (1 + client)}{room}", prompt=f"turn {'on and off ' * client}the lamp in room {room}")
        for room in range(16 - 4 * client)
    ]
    return prepare(records, model.base.tokenizer, 64)[0]


def start_of(model: AdaptedModel, seed: int = 0) -> Any:
    """Returns an adapter all of whose factors have gradients."""
    vector = model.layout.initial(0)
    vector += np.random.default_rng(seed).standard_normal(vector.size).astype(np.float32) * np.float32(0.02)
    return vector


def tasks_of(model: AdaptedModel, task: LocalTask = TASK, clients: int = 3) -> list[ClientTask]:
    received = start_of(model)
    return [ClientTask(examples_of(model, index), received, changed(task, seed=index)) for index in range(clients)]


def serially(model: AdaptedModel, tasks: Sequence[ClientTask]) -> list[LocalResult]:
    return [train_locally(model, each.examples, each.received, each.task) for each in tasks]


def distance(left: Any, right: Any) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def check_equal(model: AdaptedModel, tasks: Sequence[ClientTask]) -> list[LocalResult]:
    """Checks that training side by side gives the results of training one after another; returns the former."""
    alone, together = serially(model, tasks), train_together(model, tasks)
    results = []
    for one, outcome in zip(alone, together, strict=True):
        assert isinstance(outcome, LocalResult), outcome
        assert distance(outcome.update, one.update) < TOLERANCE[tasks[0].task.work.optimizer]
        assert outcome.loss == pytest.approx(one.loss, rel=1e-4)
        assert (outcome.steps, outcome.examples, outcome.target_tokens) == (one.steps, one.examples, one.target_tokens)
        assert outcome.tokens >= one.tokens
        results.append(outcome)
    for one, outcome in zip(alone[1:], results, strict=False):
        assert distance(outcome.update, one.update) > 0.3, "clients that learn the same show nothing"
    return results


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("settings", [LORA, CORE], ids=lambda settings: settings.kind)
def test_every_architecture_trains_side_by_side_as_alone(
    make_model: MakeModel, architecture: str, settings: AdapterSettings, optimizer: Any
) -> None:
    model = load(make_model, architecture, settings)
    assert reason_against(model) is None
    factors: Any = "r" if settings.kind == "core" else "ab"
    check_equal(model, tasks_of(model, changed(TASK, factors=factors, optimizer=optimizer)))


@pytest.mark.parametrize("factors", ["a", "b"])
def test_only_the_asked_factors_move(llama: AdaptedModel, factors: Any) -> None:
    check_equal(llama, tasks_of(llama, changed(TASK, factors=factors)))


def test_clients_with_fewer_steps_have_the_values_of_their_own_last_step(llama: AdaptedModel) -> None:
    results = check_equal(llama, tasks_of(llama, changed(TASK, local_steps=0, local_epochs=1.0)))
    assert len({each.steps for each in results}) > 1


def test_proximal_term_weight_decay_and_clipping_are_each_clients_own(llama: AdaptedModel) -> None:
    plain = train_together(llama, tasks_of(llama))
    for changes in ({"proximal": 5.0}, {"weight_decay": 5.0}, {"max_gradient_norm": 1e-9}):
        results = check_equal(llama, tasks_of(llama, changed(TASK, local_steps=6, **changes)))
        other = check_equal(llama, tasks_of(llama, changed(TASK, local_steps=6)))
        assert distance(results[0].update, other[0].update) > 0.01, changes
    assert all(isinstance(each, LocalResult) for each in plain)


@pytest.mark.parametrize("settings", [LORA, CORE], ids=lambda settings: settings.kind)
def test_ranks_that_a_client_does_not_own_stay_as_received(make_model: MakeModel, settings: AdapterSettings) -> None:
    model = load(make_model, settings=settings)
    factors: Any = "r" if settings.kind == "core" else "ab"
    tasks = tasks_of(model, changed(TASK, factors=factors, optimizer="adamw", weight_decay=0.5))
    owned: list[Any] = [(0, 2), None, (1,)]
    tasks = [
        ClientTask(each.examples, each.received, changed(each.task, owned=own))
        for each, own in zip(tasks, owned, strict=True)
    ]
    results = check_equal(model, tasks)
    shares = [float(np.count_nonzero(each.update) / each.update.size) for each in results]
    assert shares[2] < shares[0] < shares[1]


def test_micro_batches_add_up_to_the_step(llama: AdaptedModel) -> None:
    check_equal(llama, tasks_of(llama, changed(TASK, batch_tokens=256, micro_batch_tokens=64)))


def test_checkpointing_gives_the_same_updates(llama: AdaptedModel) -> None:
    check_equal(llama, tasks_of(llama, changed(TASK, gradient_checkpointing=True)))


def test_clients_may_have_received_different_adapters(llama: AdaptedModel) -> None:
    tasks = [ClientTask(each.examples, start_of(llama, seed), each.task) for seed, each in enumerate(tasks_of(llama))]
    check_equal(llama, tasks)


def test_the_order_of_the_clients_does_not_matter(llama: AdaptedModel) -> None:
    tasks = tasks_of(llama)
    forwards, backwards = train_together(llama, tasks), train_together(llama, tasks[::-1])[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert isinstance(one, LocalResult)
        assert isinstance(other, LocalResult)
        assert distance(one.update, other.update) < TOLERANCE["adamw"]


def test_the_same_call_gives_the_same_bits_and_leaves_the_single_adapter_alone(llama: AdaptedModel) -> None:
    tasks = tasks_of(llama)
    before = serially(llama, tasks)
    first, again = train_together(llama, tasks), train_together(llama, tasks)
    after = serially(llama, tasks)
    for one, other in zip((*first, *before), (*again, *after), strict=True):
        assert isinstance(one, LocalResult)
        assert isinstance(other, LocalResult)
        assert np.array_equal(one.update, other.update)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_client_that_goes_astray_fails_alone_with_the_error_of_serial_training(
    llama: AdaptedModel, optimizer: Any
) -> None:
    tasks = tasks_of(llama, changed(TASK, optimizer=optimizer))
    astray = start_of(llama)
    astray[:] = 1e38
    tasks[1] = ClientTask(tasks[1].examples, astray, tasks[1].task)
    with pytest.raises(UpdateError) as alone:
        serially(llama, tasks[1:2])
    outcomes = train_together(llama, tasks)
    assert str(outcomes[1]) == str(alone.value)
    others = [tasks[0], tasks[2]]
    for one, outcome in zip(serially(llama, others), (outcomes[0], outcomes[2]), strict=True):
        assert isinstance(outcome, LocalResult)
        assert distance(outcome.update, one.update) < TOLERANCE[optimizer]


def test_a_gradient_and_an_update_that_are_not_finite_are_told_apart(llama: AdaptedModel) -> None:
    """The first step is finite, and throws the values so far that the second is not."""
    tasks = tasks_of(llama, changed(TASK, learning_rate=1e38, local_steps=2))
    for task, outcome in zip(tasks, train_together(llama, tasks), strict=True):
        with pytest.raises(UpdateError) as alone:
            serially(llama, [task])
        assert str(outcome) == str(alone.value)


def test_a_client_without_examples_or_with_a_broken_adapter_never_joins_the_pass(llama: AdaptedModel) -> None:
    tasks = tasks_of(llama)
    broken = start_of(llama)
    broken[0] = np.nan
    outcomes = train_together(
        llama, [ClientTask([], tasks[0].received, TASK), ClientTask(tasks[1].examples, broken, TASK), tasks[2]]
    )
    assert [str(each) for each in outcomes[:2]] == [
        "the client has no examples to train on",
        "the received adapter is not finite",
    ]
    assert isinstance(outcomes[2], LocalResult)


def test_dropout_and_fp16_are_reasons_to_train_one_after_another(make_model: MakeModel) -> None:
    for settings in ({"architecture": "gpt2"}, {"attention_dropout": 0.1}):
        dropping = adapt(load_base(ModelSettings(str(make_model(**settings))), precision="fp32"), LORA)
        assert "dropout" in (reason_against(dropping) or "")
    halves = adapt(load_base(ModelSettings(str(make_model())), precision="fp16"), LORA)
    assert "fp16" in (reason_against(halves) or "")


def test_positions_that_follow_from_a_batchs_longest_example_are_a_reason_to_train_one_after_another(
    make_model: MakeModel,
) -> None:
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = make_model("llama", rope_parameters=rotation)
    assert "dynamic" in (reason_against(adapt(load_base(ModelSettings(str(dynamic)), precision="fp32"), LORA)) or "")


def test_a_layer_whose_input_has_other_rows_is_refused() -> None:
    rows = PaddedRows.of([2, 0, 1], torch.device("cpu"))
    assert rows.split(torch.zeros(3, 5, 7)).shape == (3, 5, 7)
    assert rows.split(torch.zeros(15, 7)).shape == (3, 5, 7)
    for shape in ((2, 5, 7), (14, 7)):
        with pytest.raises(MixedRowsError, match="the batch has 3 rows"):
            rows.split(torch.zeros(shape))
    stretches = Stretches([10, 0, 5])
    assert stretches.split(torch.zeros(1, 15, 7)).shape == stretches.split(torch.zeros(15, 7)).shape == (15, 7)
    with pytest.raises(MixedRowsError, match="the batch has 15 tokens"):
        stretches.split(torch.zeros(1, 14, 7))


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [2, 0, 2], [3, 1, 2], [0, 0, 3]])
def test_each_token_is_multiplied_by_its_clients_factors(counts: list[int], padding: str) -> None:
    """Against plain products, client by client; in whole numbers, so that they are exact."""
    length = 5
    rows: ClientRows = PaddedRows.of(counts, torch.device("cpu"))
    if padding != "padded":
        rows = Stretches([length * count for count in counts])
    tokens = length * sum(counts)
    draw = torch.Generator().manual_seed(0)
    values, base, factors, sums = (
        torch.randint(-4, 5, shape, generator=draw).float()
        for shape in ((tokens, 2), (tokens, 3), (3, 2, 3), (3, 2, 3))
    )
    owners = [client for client, count in enumerate(counts) for _ in range(length * count)]
    products = torch.stack([value @ factors[owner] for value, owner in zip(values, owners, strict=True)])
    split, held = rows.split(values), rows.spread(factors)
    assert rows.times(split, held).reshape(tokens, 3).equal(products)
    totals = base.clone()
    rows.add_times(rows.split(totals), split, held, 2.0)
    assert totals.equal(base + 2 * products)
    expected = sums.clone()
    for value, other, owner in zip(values, base, owners, strict=True):
        expected[owner] += 2 * torch.outer(value, other)
    rows.add_outer(sums, split, rows.split(base), 2.0)
    assert sums.equal(expected)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_many_muon_steps_as_torchs_muon_on_every_matrix(shape: tuple[int, int]) -> None:
    work = changed(TASK, optimizer="muon", weight_decay=0.1, learning_rate=0.02).work
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, *shape, generator=generator)
    many = torch.nn.Parameter(values.clone())
    ones = [torch.nn.Parameter(value.clone()) for value in values]
    together = ManyMuon([many], work)
    apart = torch.optim.Muon(ones, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        many.grad = torch.randn(3, *shape, generator=generator)
        for index, one in enumerate(ones):
            one.grad = many.grad[index].clone()
        together.step()
        apart.step()  # type: ignore[no-untyped-call] # torch's own has no types
    moved = torch.stack([one.detach() for one in ones]) - values
    assert float((many.detach() - values - moved).norm() / moved.norm()) < 0.02


def test_orthogonal_matrices_keep_their_directions() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 2.0]))[None]
    found = orthogonal(matrix).float()[0]
    assert ((found.diag() > 0.5) & (found.diag() < 1.5)).all()
    assert float((found - torch.diag(found.diag())).abs().max()) < 0.05
