"""Does the demo still learn if some clients are hostile, from one secure sum or by a rule over the sums of groups?

Hostile clients train as they are asked, and then send something else, within all that a server checks:

    negative        the negative of the own update, scaled to the round's clip
    now and then    the same in every second round, in the others the own update
    together        the negative of the mean of all hostile clients' updates, scaled to the clip
    a little back   the negative of half that mean, unscaled
    one direction   the same random direction from all of them in every round, at the clip
    noise           a random direction of each one's own, at the clip
    in the spread   the mean of the hostile clients' updates, less their standard deviation, value by value

    k           clients of a group
    poisoned    share of the groups that would have a hostile client if nobody was left out; 1 - (1 - p)^k is expected
    found       hostile clients that group testing leaves out at the end
    wronged     honest clients that it left out in any round
    exact       exact match on the server's held-out examples after the last round
    loss        their loss

The demo's job with more households and, but for one row, fewer rounds: 5 rounds with 30, 6 with 40. One seed.

    python benchmarks/influence/hostile_demo.py                   # every row: two minutes or so each on idle cores
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
from fedtune.core.adapter.layout import Vector
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
SPREAD = 1.0  # standard deviations below the mean


@dataclass(frozen=True)
class Row:
    """The groups of a cohort, its number of hostile clients, the rule over the groups, and what hostile clients do."""

    groups: int
    hostile: int
    robust: str = "none"
    share: float = 0.4
    attack: str = "negative"
    households: int = 30
    rounds: int = 5

    @property
    def names(self) -> list[str]:
        """The hostile clients, spread over the population."""
        return [f"{index * self.households // self.hostile:03d}" for index in range(self.hostile)]


def tested(attack: str, hostile: int) -> Row:
    """Returns a row with group testing, which expects a fifth of hostile clients."""
    return Row(13, hostile, "group-testing", 0.2, attack, 40, 6)


def forty(groups: int, hostile: int, robust: str, attack: str) -> Row:
    """Returns a row to compare those with."""
    return Row(groups, hostile, robust, 0.4, attack, 40, 6)


ROWS = {
    "one sum, honest": Row(1, 0),
    "one sum": Row(1, 6),
    "10 groups, median": Row(10, 6, "median"),
    "10 groups, median, 3 hostile": Row(10, 3, "median"),
    "one sum, 3 hostile": Row(1, 3),
    "10 groups, median, honest": Row(10, 0, "median"),
    "10 groups, trimmed mean, 3 hostile": Row(10, 3, "trimmed-mean"),
    "5 groups, median, 3 hostile": Row(5, 3, "median"),
    "forty, one sum, honest": forty(1, 0, "none", "negative"),
    "forty, one sum": forty(1, 8, "none", "negative"),
    "forty, one sum, together": forty(1, 8, "none", "together"),
    "forty, one sum, a little back": forty(1, 8, "none", "a little back"),
    "forty, 13 groups, median, together": forty(13, 8, "median", "together"),
    "group testing, honest": tested("negative", 0),
    "group testing": tested("negative", 8),
    "group testing, together": tested("together", 8),
    "group testing, a little back": tested("a little back", 8),
    "group testing, a little back, 16 rounds": replace(tested("a little back", 8), rounds=16),
    "group testing, one direction": tested("one direction", 8),
    "group testing, in the spread": tested("in the spread", 8),
    "group testing, now and then": tested("now and then", 8),
    "group testing, noise": tested("noise", 8),
    "group testing, 1 hostile": tested("negative", 1),
}


def at_norm(direction: Vector, norm: float) -> Vector:
    """Returns a vector of this direction and norm."""
    length = float(np.linalg.norm(direction.astype(np.float64)))
    return (direction * (norm / max(length, 1e-30))).astype(np.float32)


def random_direction(count: int, *seed: int) -> Vector:
    """Returns a random direction."""
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


class Hostile(Device):
    """A device of which some clients are hostile, and know each other's updates."""

    row: Row
    pooled: tuple[int, Vector] = (0, np.empty(0, dtype=np.float32))

    def _pooled(self, request: TrainRequest) -> Vector:
        """Returns the hostile clients' own updates, (clients, values)."""
        if self.pooled[0] != request.round:
            own = [super(Hostile, self)._train(name, request).updates[0] for name in self.row.names]
            self.pooled = request.round, np.stack(own)
        return self.pooled[1]

    def _train(self, client: str, request: TrainRequest) -> Any:
        made = super()._train(client, request)
        if client not in self.row.names:
            return made
        (terms,), (own,) = made.terms, made.updates
        return replace(made, updates=(self._sent(client, request, own, terms.clip),))

    def _sent(self, client: str, request: TrainRequest, own: Vector, clip: float) -> Vector:
        match self.row.attack:
            case "now and then" if request.round % 2 == 0:
                return own
            case "negative" | "now and then":
                return at_norm(-own, clip)
            case "together":
                return at_norm(-self._pooled(request).mean(axis=0), clip)
            case "a little back":
                back: Vector = -self._pooled(request).mean(axis=0) / 2
                return back
            case "one direction":
                return at_norm(random_direction(own.size), clip)
            case "noise":
                return at_norm(random_direction(own.size, request.round, int(client)), clip)
            case "in the spread":
                pooled = self._pooled(request)
                spread: Vector = (pooled.mean(axis=0) - SPREAD * pooled.std(axis=0)).astype(np.float32)
                return spread
        raise ValueError(f"no attack is called {self.row.attack}")


def hostile_devices(hostile: Row) -> type[Device]:
    """Returns devices with the hostile clients of a row."""

    class OfRow(Hostile):
        row = hostile

    return OfRow


def run(row: Row) -> dict[str, Any]:
    """Runs a row; returns its figures."""
    overrides = [
        "export.formats=[]",
        f"data.clients={row.households}",
        f"federation.clients_per_round={row.households}",
        f"federation.rounds={row.rounds}",
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
        patch.object(simulation_context, "Device", hostile_devices(row)),
    ):
        path = Path(folder) / "run"
        context = SimulationContext.begin(job, path / CLIENTS)
        with closing(RunDirectory.create(path, job, context.base.digest)) as directory:
            summary = run_job(context, directory, Silent())
            kept, rounds = directory.restore(), directory.rounds()
    names = [f"{index:03d}" for index in range(row.households)]
    cuts = [cut_cohort(job, number, names, UNSUSPECTED).groups for number in range(1, row.rounds + 1)]
    condemned = set(kept.state.evidence.condemned) if kept else set()
    absent = {name for line in rounds for name in names if name not in {client["id"] for client in line["clients"]}}
    poisoned = float(np.mean([bool(set(group) & set(row.names)) for cut in cuts for group in cut]))
    score = summary["eval_after"]
    return {
        "k": row.households // row.groups,
        "poisoned": poisoned,
        "sums": summary["secure_aggregation"]["sums"],
        "found": len(condemned & set(row.names)),
        "wronged": len((absent | condemned) - set(row.names)),
        "exact": score["exact_match"],
        "loss": score["loss"],
        "seconds": time.monotonic() - started,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    titles = "| row | hostile | k | poisoned | found | wronged | exact | loss | seconds |"
    lines = [titles, "|" + " --- |" * 9]
    for name, row in ROWS.items():
        if name in results:
            found = results[name]
            lines.append(
                f"| {name} | {row.hostile} of {row.households} | {found['k']} | {found['poisoned']:.0%} | "
                f"{found.get('found', '')} | {found.get('wronged', '')} | "
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
