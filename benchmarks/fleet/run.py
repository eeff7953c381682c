"""How much virtual time does each way of choosing clients take to a target exact match on a fleet of unequal devices?

The bundled fleet and the demo's task, one household a device, as `fedtune simulate --fleet` runs it. Training is real,
but time is the fleet's: a device's seconds follow from its kind, with jitter, and devices are ineligible or vanish as
often as their kind, in the same way for every policy.

    uniform          K clients, and the round waits for the slowest
    deadline-aware   1.3·K of those that can do some of the work by the deadline, 1.3 × the 80th percentile of predicted
                     times; slow ones do as many steps as they can; the round closes with the K-th update
    utility-aware    the same, chosen by Oort's utility

    python benchmarks/fleet/run.py                    # about four minutes on two cores
    python benchmarks/fleet/run.py --fleet my.toml --target 0.5
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from fedtune.core.errors import FedtuneError
from fedtune.core.job.device_kinds import Fleet, load_fleet
from fedtune.core.job.job_file import load_job
from fedtune.core.round_records import RoundRecord
from fedtune.demo import FLEET, JOB
from fedtune.server.run_directory import VIRTUAL, read_virtual
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

HERE = Path(__file__).parent
CLIENTS, COHORT, MOST_ROUNDS = 100, 10, 24
POLICIES = {"uniform": "uniform", "deadline-aware": "deadline", "utility-aware": "utility"}


class Reached(Exception):  # noqa: N818 - it is not an error
    """Raised when the target is met and no further round is needed."""


@dataclass(frozen=True)
class Outcome:
    """One policy's run.

    Args:
        seconds: virtual seconds until the target was met; None if it was not.
        updates: kind -> number of updates in aggregates.
    """

    rounds: int
    seconds: float | None
    total: float
    exact_match: float
    updates: Counter[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=Path, default=FLEET)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    try:
        fleet = load_fleet(options.fleet)
        outcomes = {policy: run(policy, options.fleet, options.target, options.overrides) for policy in POLICIES}
    except FedtuneError as error:
        parser.exit(error.exit_status, f"{error}\n")
    table = format_table(outcomes, fleet)
    print(f"\n{table}")
    if not options.dry:
        write_results(table, options.target)


class Watch(Silent):
    """A display that prints every round and stops the run at the target."""

    def __init__(self, policy: str, path: Path, target: float) -> None:
        self.policy, self.path, self.target = policy, path, target
        self.exact_match = 0.0

    def note(self, text: str) -> None:
        if text.startswith("sits out"):
            print(text, flush=True)

    def round(self, record: RoundRecord) -> None:
        self.exact_match = record.eval.exact_match if record.eval else 0.0
        virtual = read_virtual(self.path / VIRTUAL)
        print(
            f"{self.policy} round {record.round}: {virtual[-1]['seconds']:.1f} s, {len(record.survivors)} of "
            f"{len(record.clients)} in time, exact match {self.exact_match:.1%} after "
            f"{sum(line['seconds'] for line in virtual):.0f} s",
            flush=True,
        )
        if self.exact_match >= self.target:
            raise Reached


def run(policy: str, fleet: Path, target: float, overrides: list[str]) -> Outcome:
    """Runs rounds until the target is met."""
    settings = [
        "secure_aggregation.enabled=false",
        "export.formats=[]",
        f"data.clients={CLIENTS}",
        f"federation.clients_per_round={COHORT}",
        f"federation.rounds={MOST_ROUNDS}",
        f"federation.selection={POLICIES[policy]}",
        f"simulation.fleet={json.dumps(str(fleet.absolute()))}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        watch = Watch(policy, path, target)
        try:
            simulate(load_job(JOB, [*settings, *overrides]), path, watch)
            reached = False
        except Reached:
            reached = True
        virtual = read_virtual(path / VIRTUAL)
    seconds = sum(line["seconds"] for line in virtual)
    updates = Counter(part["kind"] for line in virtual for part in line["clients"] if part["counts"])
    return Outcome(len(virtual), seconds if reached else None, seconds, watch.exact_match, updates)


def format_table(outcomes: dict[str, Outcome], fleet: Fleet) -> str:
    """Formats the outcomes as a Markdown table."""
    names = [kind.name for kind in fleet.kind]
    head = ("policy", "virtual s to target", "of uniform", "rounds", "s a round", *(f"updates of {n}" for n in names))
    lines = [list(head), ["---"] * len(head)]
    baseline = outcomes["uniform"].seconds
    for policy, outcome in outcomes.items():
        counted = sum(outcome.updates.values())
        lines.append(
            [
                policy,
                "not reached" if outcome.seconds is None else f"{outcome.seconds:.0f}",
                f"{outcome.seconds / baseline:.0%}" if outcome.seconds and baseline else "",
                f"{outcome.rounds}",
                f"{outcome.total / outcome.rounds:.1f}",
                *(f"{outcome.updates[name] / counted:.0%}" for name in names),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_results(table: str, target: float) -> None:
    """Writes the table beside this program."""
    question, _, rest = (__doc__ or "").partition("\n\n")
    command = shlex.join(["python", "benchmarks/fleet/run.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}"
    ran = f"`{command}` on {datetime.date.today():%Y-%m-%d}: {machine}. Target: exact match {target:.0%}; one seed."
    text = ["# Choosing clients on a fleet, in virtual time", question, ran, table, rest.strip()]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
