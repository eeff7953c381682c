"""Does a fleet of mixed ranks reach the exact match of equal ranks on the demo, and with which aggregator?

Ten households, rank 16 throughout, or four of rank 16, three of rank 8 and three of rank 4. Updates travel as float32,
so that only the method differs. "Mixed" devices load the whole adapter and train their rank indices under the public
permutation, and each index is divided by its owners' weight; "zero-padded" ones see and train a fixed prefix of the
rank indices, and sums are divided by the whole cohort's weight. Bytes up are those of an answer: 4 for each trained
value and a few tens of overhead.

    python benchmarks/aggregation/demo.py                    # every row: a minute or two each
    python benchmarks/aggregation/demo.py --rows "fedavg, mixed" --seeds 0
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import LocalResult, LocalTask
from fedtune.core.adapter import tiers
from fedtune.core.adapter.layout import Vector
from fedtune.core.adapter.lora_layout import lora_layout
from fedtune.core.job.job_file import load_job
from fedtune.core.job.methods import method_of
from fedtune.core.job.settings import Job
from fedtune.data.examples import Example
from fedtune.demo import JOB
from fedtune.server.run_directory import CLIENTS, RunDirectory, read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulated_run import run_job
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.aggregation.aggregator import Frame, Update
from fedtune.strategies.aggregation.mean import Mean, MeanOfOwners
from fedtune.strategies.assembly import NO_PARTS, Parts

HERE = Path(__file__).parent
RANKS = (16, 16, 16, 16, 8, 8, 8, 4, 4, 4)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A way to train clients and combine their updates.

    Args:
        ranks: the clients' ranks: "equal", "mixed" or "zero-padded".
    """

    aggregation: str
    ranks: str = "equal"


MIXABLE = ("fedavg", "alternating", "ffa", "flexlora", "flora")  # fedrot needs equal ranks
ROWS = {
    **{name: Row(name) for name in (*MIXABLE, "fedrot")},
    **{f"{name}, mixed": Row(name, "mixed") for name in MIXABLE},
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
    """Returns exact match and loss after the job's last round, and the bytes up per client-round."""
    settings = [
        "adapter.kind=lora",  # the methods and the ranks are LoRA's
        f"adapter.rank={max(RANKS)}",
        "secure_aggregation.enabled=false",
        "export.formats=[]",
        "compression.preset=none",
        "federation.evaluate_every=0",
        f"federation.aggregation={row.aggregation}",
        f"training.seed={seed}",
        *([f"simulation.ranks={list(RANKS)}"] if row.ranks != "equal" else []),
        *overrides,
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate_row(load_job(JOB, settings), Path(folder) / "run", row)
        bytes_up = statistics.fmean(line["bytes"]["up_per_client"] for line in read_rounds(Path(folder) / "run"))
    score = summary["eval_after"]
    print(f"{name}, seed {seed}: exact match {score['exact_match']:.1%}, loss {score['loss']:.4f}, ", end="")
    print(f"{bytes_up:,.0f} bytes up, {time.monotonic() - started:.0f} s", flush=True)
    return [score["exact_match"], score["loss"], bytes_up]


def simulate_row(job: Job, path: Path, row: Row) -> dict[str, Any]:
    """Returns the summary of a run.

    Zero-padding works as in HeteroLoRA: clients use only a fixed prefix of the rank indices in the forward pass, and
    sums are divided by the whole cohort's weight.
    """
    padded = row.ranks == "zero-padded"
    prefixes = patch.object(tiers, "_order", lambda *drawn: np.arange(drawn[-1])) if padded else nullcontext()
    context = SimulationContext.begin(job, path / CLIENTS, make_trainer=Alone if padded else None)
    parts = Parts(aggregator=ZeroPadded(method_of(job.federation))) if padded else NO_PARTS
    with (
        closing(RunDirectory.create(path, job, context.base.digest)) as directory,
        prefixes if padded else nullcontext(),
    ):
        return run_job(context, directory, Silent(), parts)


class Alone(TorchTrainer):
    """A client that sees its own rank indices only."""

    def train(self, examples: Sequence[Example], received: Vector, task: LocalTask) -> LocalResult:
        seen, every = received.copy(), np.arange(self.layout.rank)
        for _, lora_b in lora_layout(self.layout).pairs(seen).values():  # views into `seen`
            lora_b[:, np.setdiff1d(every, task.owned or every)] = 0
        return super().train(examples, seen, task)


class ZeroPadded(Mean):
    """A mean divided by the whole cohort's weight, where an index that a client does not own counts as zero."""

    def begin(self, frame: Frame) -> MeanOfOwners:
        return PaddedMean(frame)


class PaddedMean(MeanOfOwners):
    """One slice, that of everybody."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(replace(frame, slices=()))

    def add(self, update: Update) -> None:
        super().add(replace(update, tier=0))


def format_table(results: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Formats the results as a Markdown table."""
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


def _write_results(results: Mapping[str, Mapping[str, list[float]]]) -> None:
    question, _, rest = (__doc__ or "").partition("\n\n")
    ran = (
        f"`python benchmarks/aggregation/demo.py` on {datetime.date.today():%Y-%m-%d}, row by row. In brackets: seeds."
    )
    text = ["# Combining adapters: the demo", question, ran, format_table(results), rest.strip()]
    (HERE / "DEMO.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
