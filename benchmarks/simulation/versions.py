"""How much faster is each row of the simulation table than it was at another commit, and in how much memory?

    git worktree add ../before COMMIT && make -C ../before .venv/.ready
    python benchmarks/simulation/versions.py --before ../before      # about ten minutes

Both checkouts run fedtune's rows of `run.py` on the bundled base in turns, each with its own virtual environment, so
that other work on the machine meets both alike. The best of several runs counts; the columns are those of `run.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contestants import CROWD, Outcome, local, measure_fedtune
from facts import markdown_row, write_table
from workload import Workload

HERE = Path(__file__).parent
RESULTS = HERE / "VERSIONS.md"
TITLE = "Simulation: client-rounds an hour and memory, against an earlier commit"
COLUMNS = ("clients", "a round", "local steps", "checkout", "client-rounds/h", "against before", "CPU s", "peak MiB")
WORKLOADS = (*(Workload(clients, 10, 5, steps) for steps in (1, 5) for clients in (10, 100)), CROWD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, with its .venv")
    parser.add_argument("--name", help="what the table calls it; by default the directory's name")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each row, of which the best counts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print the table, but leave VERSIONS.md as it is")
    options = parser.parse_args()
    before = options.before.resolve() / ".venv/bin/python"
    if not before.exists():
        parser.error(f"--before: {before} is missing; expected a checkout after `make .venv/.ready`")
    lines = [markdown_row(COLUMNS), markdown_row(["---"] * len(COLUMNS))]
    print(*lines, sep="\n", flush=True)
    for workload in WORKLOADS:
        found = measure_in_turns(workload, [str(before), sys.executable], options)
        for name, outcome in zip((options.name or options.before.name, "this one"), found, strict=True):
            rate = outcome.rate / found[0].rate
            processor = found[0].processor_seconds / outcome.processor_seconds
            figures = [f"{outcome.rate:,.0f}", f"**{rate:.2f}x** (CPU {processor:.2f}x)"]
            figures += [f"{outcome.processor_seconds:.3f}", f"{outcome.peak_mib:,.0f}"]
            sizes = [f"{workload.clients:,}", str(workload.cohort), str(workload.local_steps)]
            lines.append(markdown_row([*sizes, name, *figures]))
            print(lines[-1], flush=True)
    if not options.dry:
        write_table(RESULTS, TITLE, "benchmarks/simulation/versions.py", lines, __doc__ or "")


def measure_in_turns(workload: Workload, pythons: Sequence[str], options: argparse.Namespace) -> list[Outcome]:
    """Returns the best outcome of each interpreter's fedtune."""
    best: dict[str, Outcome] = {}
    for _ in range(options.repetitions):
        for python in pythons:
            outcome = measure_fedtune(workload, local(options.workers), python=python)
            best[python] = max(outcome, best.get(python, outcome), key=lambda each: each.rate)
    return [best[python] for python in pythons]


if __name__ == "__main__":
    main()
