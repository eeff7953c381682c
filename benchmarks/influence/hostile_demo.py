"""Does the demo still learn if some clients are hostile, from one secure sum or by a rule over the sums of groups?

Every hostile client trains as it is asked and sends the negative of its update, scaled to the round's clip: within all
that a server checks, and in every round.

    k           clients of a group
    poisoned    share of the groups that had a hostile client, over all rounds; 1 - (1 - p)^k is expected
    exact       exact match on the server's held-out examples after the last round
    loss        their loss

The demo's job with a third of its rounds, on thirty households.

    python benchmarks/influence/hostile_demo.py                   # every row: a minute or two each on idle cores
    python benchmarks/influence/hostile_demo.py --rows "one sum"
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from influence_results import write_section

from fedtune.client.device import Device
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.messages import TrainRequest
from fedtune.demo import JOB
from fedtune.server.run_directory import CLIENTS, RunDirectory
from fedtune.server.run_display import Silent
from fedtune.server.simulation import simulation_context
from fedtune.server.simulation.simulated_run import run_job
from fedtune.server.simulation.simulation_context import SimulationContext
from fedtune.strategies.cohorts.grouping import cut_cohort
from fedtune.strategies.cohorts.suspicion import UNSUSPECTED

TITLE = "Does the demo still learn if some of its clients are hostile?"
KEPT = Path(__file__).with_name("hostile_demo.json")  # rows of earlier calls: a table can be measured in parts
HOUSEHOLDS, ROUNDS = 30, 5


@dataclass(frozen=True)
class Row:
    """The groups of a cohort, its number of hostile clients, and the rule over the groups."""

    groups: int
    hostile: int
    robust: str = "none"
    share: float = 0.4

    @property
    def names(self) -> list[str]:
        """The hostile clients, spread over the population."""
        return [f"{index * HOUSEHOLDS // self.hostile:03d}" for index in range(self.hostile)]


ROWS = {
    "one sum, honest": Row(1, 0),
    "one sum": Row(1, 6),
    "10 groups, median": Row(10, 6, "median"),
    "10 groups, median, 3 hostile": Row(10, 3, "median"),
    "one sum, 3 hostile": Row(1, 3),
    "10 groups, median, honest": Row(10, 0, "median"),
    "10 groups, trimmed mean, 3 hostile": Row(10, 3, "trimmed-mean"),
    "5 groups, median, 3 hostile": Row(5, 3, "median"),
}


def hostile_devices(hostile: list[str]) -> type[Device]:
    """Returns devices on which these clients send the negative of their update, scaled to the clip."""

    class Hostile(Device):
        def _train(self, client: str, request: TrainRequest) -> Any:
            made = super()._train(client, request)
            if client not in hostile:
                return made
            turned = []
            for terms, update in zip(made.terms, made.updates, strict=True):
                norm = float(np.linalg.norm(update.astype(np.float64)))
                turned.append((update * (-terms.clip / max(norm, 1e-30))).astype(np.float32))
            return replace(made, updates=tuple(turned))

    return Hostile


def run(row: Row) -> dict[str, Any]:
    """Runs a row; returns its figures."""
    overrides = [
        "export.formats=[]",
        f"data.clients={HOUSEHOLDS}",
        f"federation.clients_per_round={HOUSEHOLDS}",
        f"federation.rounds={ROUNDS}",
        "federation.evaluate_every=0",
        "data.holdout=0",
        "adapter.tiers=[40]",
        f"federation.robust={row.robust}",
        f"federation.robust_share={row.share}",
        f"secure_aggregation.groups={row.groups}",
    ]
    job, started = load_job(JOB, overrides), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(simulation_context, "Device", hostile_devices(row.names)),
    ):
        path = Path(folder) / "run"
        context = SimulationContext.begin(job, path / CLIENTS)
        with closing(RunDirectory.create(path, job, context.base.digest)) as directory:
            summary = run_job(context, directory, Silent())
    names = [f"{index:03d}" for index in range(HOUSEHOLDS)]
    cuts = [cut_cohort(job, number, names, UNSUSPECTED).groups for number in range(1, ROUNDS + 1)]
    poisoned = float(np.mean([bool(set(group) & set(row.names)) for cut in cuts for group in cut]))
    score = summary["eval_after"]
    return {
        "k": HOUSEHOLDS // row.groups,
        "poisoned": poisoned,
        "sums": summary["secure_aggregation"]["sums"],
        "exact": score["exact_match"],
        "loss": score["loss"],
        "seconds": time.monotonic() - started,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    lines = ["| row | hostile | k | poisoned | exact | loss | seconds |", "|" + " --- |" * 7]
    for name, row in ROWS.items():
        if name in results:
            found = results[name]
            lines.append(
                f"| {name} | {row.hostile} of {HOUSEHOLDS} | {found['k']} | {found['poisoned']:.0%} | "
                f"{found['exact']:.1%} | {found['loss']:.3f} | {found['seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for name in options.rows:
        results[name] = run(ROWS[name])
        print(name, results[name], flush=True)
        KEPT.write_text(json.dumps(results, indent=1) + "\n")
        write_section(TITLE, f"{table(results)}\n\n{(__doc__ or '').strip()}")
    print(table(results))


if __name__ == "__main__":
    main()
