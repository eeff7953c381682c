"""On the demo: does a fleet of mixed ranks reach what equal ranks reach, and which aggregator gets there?

Ten households, rank 16 throughout, or four of rank 16, three of rank 8 and three of rank 4. Updates travel as float32,
so that the method alone decides. "Mixed" devices load the whole adapter and train their rank indices under the public
permutation, and each index is divided by its owners' weight; "zero-padded" ones see and train a fixed prefix of the
rank indices, and sums are divided by the whole cohort's weight. Bytes up are 4 a trained value.

    python benchmarks/aggregation/demo.py                    # every row: about two and a half minutes each
    python benchmarks/aggregation/demo.py --rows "fedavg, mixed" --seeds 0
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.client.training import LocalTask, train_locally
from fedtune.core.adapter import AdapterLayout, Factor, Vector, factor_letters
from fedtune.core.alignment import align_update
from fedtune.core.job import DEFAULT_LOCAL_STEPS, Job, load_job
from fedtune.core.seeds import derive_seed
from fedtune.core.tiers import coordinates, rank_indices
from fedtune.demo import JOB
from fedtune.model.examples import hold_out
from fedtune.server.evaluator import ModelEvaluator
from fedtune.server.simulation.workshop import Workshop
from fedtune.strategies.aggregators import NOTHING, FedRot, aggregator_named
from fedtune.strategies.aggregators.owned import OwnedMean
from fedtune.strategies.round import scheduled_learning_rate

HERE = Path(__file__).parent
TIERS = (16, 16, 16, 16, 8, 8, 8, 4, 4, 4)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A way to train and combine.

    Args:
        mixed: "no", "owners" or "zero-padded".
    """

    aggregation: str
    mixed: str = "no"


ROWS = {
    "fedavg": Row("fedavg"),
    "alternating": Row("alternating"),
    "ffa": Row("ffa"),
    "fedrot": Row("fedrot"),
    "flexlora": Row("flexlora"),
    "flora": Row("flora"),
    "fedavg, mixed": Row("fedavg", "owners"),
    "alternating, mixed": Row("alternating", "owners"),
    "ffa, mixed": Row("ffa", "owners"),
    "fedavg, zero-padded": Row("fedavg", "zero-padded"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    options = parser.parse_args()
    kept = HERE / "demo.json"  # rows of earlier calls, so that a table can be measured in parts
    results: dict[str, dict[str, list[float]]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for seed in options.seeds:
        for name in options.rows:
            results.setdefault(name, {})[str(seed)] = run(name, ROWS[name], seed, options.overrides)
            if not options.dry:
                kept.write_text(json.dumps(results, indent=1) + "\n")
                _write_results(results)
    print(f"\n{format_table(results)}")


def run(name: str, row: Row, seed: int, overrides: list[str]) -> list[float]:
    """Exact match, loss and bytes up a client-round, after the job's last round."""
    job = load_job(
        JOB,
        [
            "secure_aggregation.enabled=false",
            "export.formats=[]",
            "compression.preset=none",
            f"training.seed={seed}",
            *overrides,
        ],
    )
    workshop = Workshop(job, Path())
    model, layout = workshop.model, workshop.model.layout
    evaluator = ModelEvaluator(model, job.data)
    aggregator = aggregator_named(row.aggregation)
    adapter, state, values = layout.initial(seed), NOTHING, 0
    started = time.monotonic()
    for number in range(1, job.federation.rounds + 1):
        factors = aggregator.factors(number)
        mixed = _Mixed(layout, factor_letters(factors), seed, number, row.mixed)
        reduction = aggregator.accumulator(layout, factors, adapter, state)
        for client, tier in zip(workshop.population.names, TIERS, strict=False):
            examples = workshop.examples(client, model, job.data.sequence_length)
            training, _ = hold_out(examples, job.data.holdout, derive_seed(seed, "holdout", client))
            rank = layout.rank if row.mixed == "no" else tier
            owned = mixed.owned(rank)
            task = _task(job, number, client, factors, None if rank == layout.rank else owned)
            seen = adapter if row.mixed != "zero-padded" else only(layout, adapter, owned)
            result = train_locally(model, training, seen, task)
            if row.mixed == "no":
                update = result.update
                if isinstance(aggregator, FedRot):
                    update = align_update(layout, adapter, update)
                reduction.add(update, result.examples)
            else:
                mixed.add(result.update, result.examples, tier)
            values += sum(len(coordinates(layout, letter, owned)) for letter in factor_letters(factors))
        after = adapter.copy()
        after[layout.segment(factors)] += reduction.finish() if row.mixed == "no" else mixed.finish()
        adapter, state = after, reduction.state
    score = evaluator.evaluate(adapter)
    assert score is not None  # the demo has evaluation data
    bytes_up = 4 * values / (job.federation.rounds * len(TIERS))
    print(f"{name}, seed {seed}: exact match {score.exact_match:.1%}, loss {score.loss:.4f}, ", end="")
    print(f"{bytes_up:,.0f} bytes up, {time.monotonic() - started:.0f} s", flush=True)
    return [score.exact_match, score.loss, bytes_up]


class _Mixed:
    """One round's reduction of updates of different rank."""

    def __init__(self, layout: AdapterLayout, letters: list[Factor], seed: int, turn: int, how: str) -> None:
        self._layout, self._letters, self._how = layout, letters, how
        self._seed, self._turn = seed, turn
        self._means = {letter: OwnedMean(layout, letter, sorted(set(TIERS)), seed, turn) for letter in letters}
        self._sums: dict[Factor, Vector] = {}
        self._weight = 0

    def owned(self, rank: int) -> np.ndarray:
        if self._how == "zero-padded":
            return np.arange(rank)
        return rank_indices(self._seed, self._turn, self._layout.rank, rank)

    def add(self, update: Vector, weight: int, tier: int) -> None:
        start = self._layout.segment(self._letters[0]).start
        self._weight += weight
        for letter in self._letters:
            segment = self._layout.segment(letter)
            part = update[segment.start - start : segment.stop - start]
            if self._how == "zero-padded":
                self._sums[letter] = self._sums.get(letter, np.zeros_like(part)) + np.float32(weight) * part
            else:
                places = coordinates(self._layout, letter, self.owned(tier))
                self._means[letter].add(part[places], weight, tier)

    def finish(self) -> Vector:
        if self._how == "zero-padded":
            return np.concatenate([self._sums[letter] / np.float32(self._weight) for letter in self._letters])
        return np.concatenate([self._means[letter].finish() for letter in self._letters])


def only(layout: AdapterLayout, adapter: Vector, owned: np.ndarray) -> Vector:
    """The adapter with all other rank indices zero in B, so that they are not in the forward pass."""
    seen = adapter.copy()
    for _, lora_b in layout.views(seen).values():
        lora_b[:, np.setdiff1d(np.arange(layout.rank), owned)] = 0
    return seen


def format_table(results: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Markdown."""
    reference = _mean(results.get("fedavg", {}), 0)
    lines = [
        "| method | exact match | over seeds | of fedavg, all rank 16 | loss | bytes up, a client-round |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ROWS:
        if seeds := results.get(name):
            matches = [values[0] for values in seeds.values()]
            ratio = f"{statistics.fmean(matches) / reference:.1%}" if reference else ""
            spread = f"{min(matches):.1%} … {max(matches):.1%} ({len(matches)})"
            loss, size = _mean(seeds, 1), _mean(seeds, 2)
            lines.append(
                f"| {name} | {statistics.fmean(matches):.1%} | {spread} | {ratio} | {loss:.4f} | {size:,.0f} |"
            )
    return "\n".join(lines)


def _mean(seeds: Mapping[str, list[float]], column: int) -> float:
    return statistics.fmean(values[column] for values in seeds.values()) if seeds else 0.0


def _task(job: Job, number: int, client: str, factors: str, owned: np.ndarray | None) -> LocalTask:
    training = job.training
    return LocalTask(
        seed=derive_seed(training.seed, "train", number, client),
        learning_rate=scheduled_learning_rate(job, number),
        factors=factors,  # type: ignore[arg-type]
        owned=None if owned is None else tuple(int(index) for index in owned),
        local_steps=training.local_steps or DEFAULT_LOCAL_STEPS,
        batch_tokens=training.batch_tokens,
        max_gradient_norm=training.max_gradient_norm,
    )


def _write_results(results: Mapping[str, Mapping[str, list[float]]]) -> None:
    question, _, rest = (__doc__ or "").partition("\n\n")
    ran = (
        f"`python benchmarks/aggregation/demo.py` on {datetime.date.today():%Y-%m-%d}, row by row. In brackets: seeds."
    )
    text = ["# Combining adapters: the demo", question, ran, format_table(results), rest.strip()]
    (HERE / "DEMO.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
