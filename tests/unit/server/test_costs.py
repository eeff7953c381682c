"""The ledger of a run's costs: what is counted sums up, and budgets end a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.errors import JobError
from fedtune.core.job.cost_settings import CostSettings
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.ledger import Ledger
from fedtune.core.round_records import ClientEvaluation, ClientRecord, Evaluation, RoundRecord
from fedtune.model.flops import ExampleLengths, Flops
from fedtune.model.shape import ModelShape
from fedtune.server.costs.budget import exhausted
from fedtune.server.costs.cost_ledger import Cost, CostLedger, cost_to_target, costs_json, money
from fedtune.server.costs.cost_statement import amount, cost_sentences, cost_table
from fedtune.server.costs.power import PowerProcess, Stated, check_energy
from fedtune.server.costs.work_counter import WorkCounter

LINEAR = tuple(AdaptedModule(f"blocks.0.{name}", 64, 64) for name in ("q", "k", "v", "o", "up", "down"))
SHAPE = ModelShape("toy", LINEAR, 20_000, 1, 64, 4, 64, 64, 64, False, 320, 256, 0)
FLOPS = Flops(SHAPE, LINEAR, "core", 8)
LENGTHS = ExampleLengths(40.0, 10.0)
WATTS = 100.0
CLEAR = Ledger().sent("adapter", 3000).received("update", 1000)
MASKED = CLEAR.sent("keys", 500).received("keys", 200).received("unmasking", 90)


def client(name: str, tier: int, **facts: Any) -> ClientRecord:
    known: dict[str, Any] = {"answered": 3.0, "traffic": MASKED} | facts
    return ClientRecord(name, tier, tier, **known)


def record(number: int, *clients: ClientRecord, exact: float | None = None) -> RoundRecord:
    held_out = ClientEvaluation("a", Evaluation(1.0, 0.5, 4, 40), Ledger().sent("evaluation", 700))
    score = None if exact is None else Evaluation(1.0, exact, 20, 200)
    return RoundRecord(number, 5.0, "r", 1e-3, clients, None, eval=score, client_evaluations=(held_out,))


def counted(job: Job, *records: RoundRecord, watts: float | None = WATTS) -> list[RoundRecord]:
    """Counts the work of rounds that are stored 8 seconds after one another."""
    clock: Iterator[float] = iter(range(0, 1000, 8))
    counter = WorkCounter(job, FLOPS, LENGTHS, Stated(watts), lambda: next(clock))
    return [counter.counted(one) for one in records]


def ledger(*records: RoundRecord, watts: float | None = WATTS) -> CostLedger:
    return CostLedger.read([one.to_json() for one in counted(Job(), *records, watts=watts)])


MIXED = [
    record(1, client("a", 40), client("b", 40, seconds=2.0), client("c", 16), exact=0.2),
    record(2, client("a", 40), client("c", 16, dropped="gone", traffic=Ledger().sent("adapter", 3000)), exact=0.7),
    record(3, client("b", 40), exact=0.8),
]


def test_shares_sum_to_totals_by_purpose_and_by_tier() -> None:
    costs = ledger(*MIXED)
    for shares in (costs.by_purpose(), costs.by_tier(), costs.until()):
        assert len(shares) > 1
    for each in fields(Cost):
        whole = getattr(costs.total, each.name)
        assert whole > 0
        for shares in (costs.by_purpose(), costs.by_tier()):
            assert sum(getattr(part, each.name) for part in shares.values()) == pytest.approx(whole, rel=0.01)
        assert getattr(costs.until()[3], each.name) == pytest.approx(whole, rel=0.01)


def test_totals_are_those_of_the_clock_the_meter_and_the_traffic() -> None:
    total = ledger(*MIXED).total
    assert total.seconds == pytest.approx(3 * 8)
    assert total.joules == pytest.approx(3 * 8 * WATTS)
    assert (total.up, total.down) == tuple(sum(one.to_json()["bytes"][way] for one in MIXED) for way in ("up", "down"))


def test_a_rounds_time_is_training_until_the_last_update_and_evaluation_outside_of_it() -> None:
    purposes = ledger(MIXED[0]).by_purpose()
    assert {name: cost.seconds for name, cost in purposes.items()} == pytest.approx(
        {"training": 3.0, "aggregation": 2.0, "evaluation": 3.0}
    )
    assert {name: cost.up for name, cost in purposes.items()} == {"training": 3000, "aggregation": 870, "evaluation": 0}


def test_training_costs_the_jobs_steps_for_every_client_whose_update_came() -> None:
    job = load_job(None, ["training.local_steps=5", "training.batch_tokens=2048", "data.sequence_length=256"])
    one, both = (counted(job, record(1, *clients))[0] for clients in ((client("a", 40),), MIXED[1].clients))
    assert [part for part in one.work if part.purpose == "training"] == [
        part for part in both.work if part.purpose == "training"
    ]
    assert one.work[0].tokens == 5 * 2048
    assert one.work[0].flops == pytest.approx(5 * 2048 / 40 * FLOPS.trained(LENGTHS, "r"))


def test_in_the_clear_a_client_with_few_examples_computes_no_more_than_those_in_a_step() -> None:
    job = load_job(None, ["training.local_steps=5"])
    work = counted(job, record(1, client("a", 40, examples=10, tokens=80, traffic=CLEAR)))[0].work
    assert work[0].tokens == 5 * 10 * 40
    assert work[0].flops == pytest.approx(50 * FLOPS.trained(ExampleLengths(40.0, 8.0), "r"))


def test_the_evaluation_before_round_one_belongs_to_it() -> None:
    clock: Iterator[float] = iter(range(10))
    counter = WorkCounter(Job(), FLOPS, LENGTHS, Stated(None), lambda: next(clock))
    counter.scored(Evaluation(4.0, 0.0, 20, 200))
    first, second = (counter.counted(replace(MIXED[0], client_evaluations=())) for _ in range(2))
    assert first.work[-1].tokens == 2 * second.work[-1].tokens == 2 * 20 * 40


def test_generated_answers_cost_what_their_length_allows() -> None:
    job = load_job(None, ["evaluation.metric=token-f1", "evaluation.answer_tokens=50"])
    scored = RoundRecord(1, 5.0, "r", 1e-3, (), None, eval=Evaluation(1.0, 0.5, 20, 200, "token-f1", 0.6))
    assert counted(job, scored)[0].work[-1].tokens == 20 * (40 + 30 + 50)


def test_money_is_the_sum_of_what_has_a_price() -> None:
    cost = Cost(seconds=7200, joules=3.6e6, up=2_000_000_000, down=10**9, device_seconds=3600)
    assert money(cost, CostSettings(kwh=0.3, gb_up=0.1, gb_down=0.05, hour=2.0, device_hour=0.5)) == pytest.approx(
        0.3 + 0.2 + 0.05 + 4.0 + 0.5
    )
    assert money(cost, CostSettings()) is None
    assert money(replace(cost, joules=None), CostSettings(kwh=0.3)) is None
    assert money(replace(cost, joules=None), CostSettings(gb_up=0.1)) == pytest.approx(0.2)


def test_the_cost_to_a_target_is_all_that_was_spent_until_it_was_first_reached() -> None:
    costs = ledger(*MIXED)
    reached = cost_to_target(costs, 0.7)
    assert reached is not None
    assert (reached.round, reached.cost) == (2, costs.until()[2])
    near_best = cost_to_target(costs)
    assert near_best is not None
    assert near_best.target == pytest.approx(0.72)
    assert near_best.round == 3
    assert cost_to_target(costs, 0.95) is None


def test_without_a_meter_joules_are_absent() -> None:
    costs = ledger(*MIXED, watts=None)
    assert costs.total.joules is None
    assert costs.energy is None
    assert not any("energy" in column for column in cost_table(costs_json(costs, CostSettings())).columns)


def test_lines_of_an_earlier_release_have_bytes_alone() -> None:
    lines = [one.to_json() for one in MIXED]
    for line in lines:
        del line["work"], line["energy"]
    costs = CostLedger.read(lines)
    assert costs.total.up == ledger(*MIXED).total.up
    assert (costs.total.flops, costs.total.joules) == (0, None)


def test_a_statement_tells_purposes_tiers_and_the_sum() -> None:
    costs = costs_json(ledger(*MIXED), CostSettings(kwh=0.3, gb_up=0.1, target=0.7))
    table = cost_table(costs)
    assert [row[0] for row in table.rows] == ["training", "aggregation", "evaluation", "tier 40", "tier 16", "in all"]
    assert table.columns[-2:] == ("energy (stated)", "money")
    assert table.rows[-1][-2] == "2.4 kJ"
    sentences = list(cost_sentences(costs, "exact"))
    assert "Exact match of 70.0% was reached in round 2, after" in sentences[1]
    assert sentences[2].endswith(
        "of the money is for compute, which is energy and hours of machines; the rest is traffic."
    )


@pytest.mark.parametrize(("value", "shown"), [(0, "0 J"), (999, "999 J"), (1234, "1.23 kJ"), (999_900, "1 MJ")])
def test_amounts_are_short(value: float, shown: str) -> None:
    assert amount(value, "J") == shown


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("seconds=24", "budget.seconds = 24 is spent: 24 after 3 rounds"),
        ("seconds=31", "budget.seconds = 31 does not suffice for another round: 3 rounds took 24, one of them 8"),
        ("seconds=32", None),
        ("bytes=10000", "budget.bytes = 10,000 is spent: "),
        ("joules=3000", "budget.joules = 3,000 does not suffice"),
        ("money=0.0001", "budget.money = 0.0001 is spent"),
        ("money=1.0", None),
    ],
)
def test_a_round_begins_only_if_one_like_those_before_fits_into_the_budget(budget: str, reason: str | None) -> None:
    job = load_job(None, [f"budget.{budget}", "cost.kwh=0.3"])
    found = exhausted(ledger(*MIXED), job)
    assert (found or "").startswith(reason or "")
    assert (found is None) is (reason is None)


def test_the_first_round_always_begins_and_unknown_joules_end_no_run() -> None:
    job = load_job(None, ["budget.joules=1", "cost.watts=100"])
    assert exhausted(ledger(), job) is None
    assert exhausted(ledger(*MIXED, watts=None), job) is None


@pytest.mark.parametrize("key", ["bytes", "joules", "money", "seconds"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_budget_of_nothing_is_refused(key: str, value: str) -> None:
    with pytest.raises(JobError, match=rf"budget\.{key}: expected greater than"):
        load_job(None, [f"budget.{key}={value}", "cost.hour=1"])


def test_a_budget_of_money_needs_a_price() -> None:
    with pytest.raises(JobError, match=r"budget\.money is 5, but \[cost\] has no price; expected one of cost\.kwh"):
        load_job(None, ["budget.money=5"])


@pytest.mark.parametrize("keys", [["budget.joules=5"], ["budget.money=5", "cost.kwh=0.3"]])
def test_a_budget_that_needs_joules_is_refused_without_a_meter(
    monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(
        JobError, match=r"nothing tells joules here; state the machine's power, cost\.watts, or install"
    ):
        check_energy(load_job(None, keys))
    check_energy(load_job(None, [*keys, "cost.watts=65"]))


def answering(code: str, patience: float = 10.0) -> PowerProcess:
    return PowerProcess((sys.executable, "-c", f"import sys, time\nwhile sys.stdin.read(1):\n    {code}"), patience)


def test_a_meter_in_a_process_of_its_own_is_read_again_and_again() -> None:
    with answering("""print('{"watts": 65.5, "source": "measured"}', flush=True)""") as meter:
        assert [meter.watts(), meter.watts()] == [65.5, 65.5]
        assert meter.source == "measured"


@pytest.mark.parametrize(
    "code",
    [
        "sys.exit(1)",
        "print('no JSON', flush=True)",
        "print('[1]', flush=True)",
        """print('{"watts": NaN, "source": "measured"}', flush=True)""",
        """print('{"watts": -5, "source": "measured"}', flush=True)""",
        """print('{"watts": 5, "source": "guessed"}', flush=True)""",
    ],
)
def test_a_meter_that_fails_tells_nothing(code: str) -> None:
    with answering(code) as meter:
        assert [meter.watts(), meter.watts()] == [None, None]


def test_a_meter_that_hangs_or_is_missing_tells_nothing() -> None:
    with answering("time.sleep(60)", patience=0.2) as meter:
        assert meter.watts() is None
    with PowerProcess(("/no/such/meter",)) as missing:
        assert missing.watts() is None


@pytest.mark.skipif(find_spec("codecarbon") is None, reason="the extra [energy] is not installed")
def test_codecarbon_reads_power_without_a_network_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = """
import socket, sys
def refused(*arguments):
    open("called", "w").close()
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refused
from fedtune.server.costs.power_process import main
main()
"""
    with PowerProcess((sys.executable, "-c", alone), patience=120) as meter:
        first = meter.watts()
        assert first is not None
        assert 0 < first < 5000
        assert meter.source in ("measured", "estimated")
    assert not list(tmp_path.iterdir())
