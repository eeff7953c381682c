"""How much does a point of exact match cost on the demo, in operations, joules, bytes and money?

Every row is the federation of benchmarks/demo/job.toml, scored after every second round, with one setting changed:

    core, secure            the job as it is: a core of rank 40, and the server sees only sums
    core, clear             the same without secure aggregation
    core, no compression    the core in float32, in the clear
    LoRA, fp32              A and B of rank 16 in float32, in the clear: plain FedAvg

A run's own ledger (fedtune.server.costs) counts everything, the server's evaluations apart: they are the same in each
row and no part of what trains an adapter. The target is an exact match of 90%. Prices are examples, PRICES below.

    python benchmarks/cost/run.py                           # four runs, about a minute each on two idle cores
    python benchmarks/cost/run.py --seeds 3
    python benchmarks/cost/run.py --only clear --dry        # what is missing; writes the table again

Joules are the whole machine's, so nothing else should run on it; they need fedtune[energy], or --watts. A finished run
is one line of results.jsonl, which is kept: a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.core.host.process import prepare_environment
from fedtune.core.job.cost_settings import CostSettings
from fedtune.core.job.job_file import load_job
from fedtune.server.costs.cost_ledger import Cost, CostLedger, compute_money, cost_to_target, money
from fedtune.server.costs.cost_statement import amount, money_text
from fedtune.server.run_directory import read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

HERE = Path(__file__).parent
JOB = HERE.parent / "demo" / "job.toml"
RUNS = HERE / "results.jsonl"
CLEAR = ("secure_aggregation.enabled=false",)
FLOAT32 = (*CLEAR, "compression.preset=none")
ROWS: Mapping[str, tuple[str, ...]] = {
    "core, secure": (),
    "core, clear": CLEAR,
    "core, no compression": FLOAT32,
    "LoRA, fp32": (*FLOAT32, "adapter.kind=lora", "adapter.rank=16", "training.learning_rate=4e-3"),
}
SCORED = ("federation.evaluate_every=2", "data.holdout=0.0")
TARGET = 0.9
PRICES = CostSettings(currency="EUR", kwh=0.30, gb_up=0.10, gb_down=0.10)
COLUMNS = (
    *("", "seeds", "exact match", "operations", "energy", "seconds", "bytes", "money", "share of compute"),
    *("operations a point", "joules a point", "bytes a point", "money a point"),
)
TARGET_COLUMNS = ("", "rounds", "operations", "energy", "seconds", "bytes", "money")
READING = (
    "A point is a hundredth of exact match, over an untrained adapter's 0%. Operations are counted from the model's "
    "sizes; seconds are wall-clock time in rounds. Money is for energy at {kwh:g} {currency} a "
    "kilowatt-hour and traffic at {gb_up:g} {currency} for 10^9 bytes either way, which are examples. Compute is the "
    "energy's share of the money. All figures are means over seeds."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--watts", type=float, help="the machine's power, instead of a meter's")
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="further overrides")
    parser.add_argument("--note", default="", help="a sentence for RESULTS.md, for example about what else ran")
    parser.add_argument("--dry", action="store_true", help="run nothing; write the table")
    options = parser.parse_args()
    prepare_environment()
    further = [*options.set, *([f"cost.watts={options.watts}"] if options.watts else [])]
    lines = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()] if RUNS.is_file() else []
    planned = [(name, seed) for seed in range(options.seeds) for name in ROWS if options.only in name]
    for name, seed in planned:
        basis = _basis(name, seed, further)
        if any(line["basis"] == basis for line in lines):
            continue
        print(f"{name}, seed {seed}", flush=True)
        if not options.dry:
            lines.append({"basis": basis, "outcome": measure(basis["settings"])})
            with RUNS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    publish([line for line in lines if line["basis"]["job"] == _job_keys()], options.note)


def measure(settings: Sequence[str]) -> dict[str, Any]:
    """Runs one federation from its beginning and returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        summary = simulate(load_job(JOB, settings), path, Silent())
        ledger = CostLedger.read(read_rounds(path))
    spent = trained(ledger)
    reached = cost_to_target(spent, TARGET)
    outcome = {
        "exact_match": summary["eval_after"]["exact_match"],
        "before": summary["eval_before"]["exact_match"],
        "energy": ledger.energy,
        "cost": _figures(spent.total),
        "evaluation": _figures(ledger.by_purpose()["evaluation"]),
        "target": {"round": reached.round, **_figures(reached.cost)} if reached else None,
    }
    print(f"  {outcome}", flush=True)
    return outcome


def trained(ledger: CostLedger) -> CostLedger:
    """Returns the ledger without evaluations."""
    kept = tuple(entry for entry in ledger.entries if entry.purpose != "evaluation")
    return CostLedger(kept, ledger.scores, ledger.rounds, ledger.energy)


def publish(lines: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Prints the tables and writes them beside this program."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["basis"]["row"], []).append(line["outcome"])
    table, targets = [COLUMNS, ("---",) * len(COLUMNS)], [TARGET_COLUMNS, ("---",) * len(TARGET_COLUMNS)]
    for name in (name for name in ROWS if name in groups):
        outcomes = groups[name]
        table.append(_row(name, outcomes))
        if reached := [outcome["target"] for outcome in outcomes if outcome["target"]]:
            rounds = f"{statistics.fmean(target['round'] for target in reached):g}"
            missed = len(outcomes) - len(reached)
            rounds += f" (not in {missed} of {len(outcomes)} seeds)" if missed else ""
            targets.append((name, rounds, *_spent(reached)))
    texts = ["\n".join(f"| {' | '.join(cells)} |" for cells in rows) for rows in (table, targets)]
    sources = sorted({outcome["energy"] or "absent" for outcomes in groups.values() for outcome in outcomes})
    print("\n\n".join(texts))
    how = (
        f"`python benchmarks/cost/run.py` on {datetime.date.today():%Y-%m-%d}: {os.cpu_count()} cores; joules are "
        f"{' and '.join(sources)} (see docs/costs.md). {note}"
    ).strip()
    parts = [
        "# What a point of exact match costs on the demo",
        how,
        texts[0],
        READING.format(kwh=PRICES.kwh, currency=PRICES.currency, gb_up=PRICES.gb_up),
        f"## Until an exact match of {TARGET:.0%} was first seen",
        texts[1],
        (__doc__ or "").partition("\n\n")[2].strip(),
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _row(name: str, outcomes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    costs = [outcome["cost"] for outcome in outcomes]
    points = 100 * statistics.fmean(outcome["exact_match"] - outcome["before"] for outcome in outcomes)
    mean = _mean(costs)
    worth = money(mean, PRICES)
    compute = compute_money(mean, PRICES)
    share = f"{compute / worth:.0%}" if worth and compute is not None else ""
    exact = statistics.fmean(outcome["exact_match"] for outcome in outcomes)
    shown = (name, str(len(outcomes)), f"{exact:.1%}", *_spent(costs), share)
    if points <= 0:
        return (*shown, "", "", "", "")
    joules = "" if mean.joules is None else f"{mean.joules / points:,.1f}"
    priced = "" if worth is None else money_text(worth / points, PRICES.currency)
    return (*shown, amount(mean.flops / points, "FLOP"), joules, amount(mean.bytes / points, "B"), priced)


def _spent(costs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    mean = _mean(costs)
    worth = money(mean, PRICES)
    return (
        amount(mean.flops, "FLOP"),
        "" if mean.joules is None else amount(mean.joules, "J"),
        f"{mean.seconds:,.0f}",
        amount(mean.bytes, "B"),
        "" if worth is None else money_text(worth, PRICES.currency),
    )


def _mean(costs: Sequence[Mapping[str, Any]]) -> Cost:
    joules = [cost["joules"] for cost in costs]
    return Cost(
        flops=statistics.fmean(cost["flops"] for cost in costs),
        seconds=statistics.fmean(cost["seconds"] for cost in costs),
        joules=None if None in joules else statistics.fmean(joules),
        up=round(statistics.fmean(cost["up"] for cost in costs)),
        down=round(statistics.fmean(cost["down"] for cost in costs)),
    )


def _figures(cost: Cost) -> dict[str, Any]:
    return {name: getattr(cost, name) for name in ("flops", "tokens", "seconds", "joules", "up", "down")}


def _basis(name: str, seed: int, further: Sequence[str]) -> dict[str, Any]:
    """Returns everything that a row's result depends on."""
    settings = [*SCORED, f"training.seed={seed}", *ROWS[name], *further]
    return {"row": name, "seed": seed, "settings": settings, "job": _job_keys()}


def _job_keys() -> dict[str, Any]:
    return tomllib.loads(JOB.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
