"""How fast is `fedtune simulate`, and how much memory does it need, against Flower's published pattern?

The peer (peer.py, peer_client.py) follows Flower's LLM fine-tuning app: every client call loads, quantizes and wraps
the model again, under FedAvg and Flower's Ray engine; as published in float32 with gradient checkpointing, and tuned,
with fedtune's bf16 and without checkpointing. All contestants get the same base model, households, 16 examples a step,
learning rate and local steps, send A and B whole (except in the row that says otherwise), evaluate nothing, see no GPU,
use as many cores, and run as separate programs, one after another.

    python benchmarks/simulation/run.py                                  # about half an hour on two idle cores
    python benchmarks/simulation/run.py --clients 10 --local-steps 5     # less

A client-round is one client's part in one round. The hourly rate and "CPU s", the processor time of a client-round in
all processes together, are measured from the end of round 1 to the end of the last; "start" is the time of launch and
round 1 beyond a steady round. "training s" is the time that a client of fedtune spends in its local steps alone; with
steps of that speed, no lead over the peer can be larger than the ratio of the peer's "CPU s" to it. Ratios are to the
peer as published and to the peer tuned. Ratios of rates include Flower's polling, which costs the peer up to 3 s a
round; on a machine with other work, ratios of processor time are more reliable. Memory is the highest sum, over the
whole tree of processes, of proportional set sizes, where a page shared by n processes counts 1/n in each. The loss is
the cohort's mean training loss in round 2, which shows that all contestants do the same work; at 100 clients their
cohorts differ.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from contestants import CROWD, Outcome, local, measure, measure_fedtune, peer_command, ray
from facts import machine_facts, markdown_row
from workload import ALPHA, RANK, Workload, make_large_base

from fedtune.demo import BASE_DIRECTORY

HERE = Path(__file__).parent
COHORT = 10
LARGE_COHORT = 4
COLUMNS = (
    "contestant",
    "base",
    "clients",
    "a round",
    "local steps",
    "rounds",
    "start s",
    "client-rounds/h",
    "CPU s",
    "training s",
    "against peer",
    "peak MiB",
    "loss",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--local-steps", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--rounds", type=int, default=6, help="of fedtune, the first one unmeasured")
    parser.add_argument("--peer-rounds", type=int, default=3, help="of the peer, the first one unmeasured")
    parser.add_argument("--workers", type=int, default=2, help="of every contestant, each with one core")
    parser.add_argument("--ray", action="store_true", help="measure fedtune's Ray backend, too")
    parser.add_argument("--no-large", action="store_true", help="leave out the base of 86 million parameters")
    parser.add_argument("--no-crowd", action="store_true", help="leave out 1,000 clients")
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    if min(options.rounds, options.peer_rounds) < 2:
        parser.error("--rounds and --peer-rounds: the first round is not measured; expected at least 2")
    table = Table()
    print(markdown_row(COLUMNS), markdown_row(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for local_steps in options.local_steps:
        for clients in options.clients:
            few = Workload(clients, min(COHORT, clients), options.peer_rounds, local_steps)
            compare(table, few, options.rounds, options.workers, options.ray)
    if not options.no_large:
        with tempfile.TemporaryDirectory() as folder:
            few = Workload(100, LARGE_COHORT, 2, 1, make_large_base(Path(folder)))
            compare(table, few, few.rounds, options.workers, options.ray)
    if not options.no_crowd:
        table.add("fedtune", CROWD, measure_fedtune(CROWD, local(options.workers)), ())
        compressed = measure_fedtune(CROWD, local(options.workers), "balanced")
        table.add("fedtune, compressed", CROWD, compressed, ())
    growth = memory_growth(table.peaks)
    print("\n".join(growth))
    if not options.dry:
        write_results(table.rows, growth)


class Table:
    """A table whose rows are printed as soon as they are measured."""

    def __init__(self) -> None:
        self.rows: list[Sequence[str]] = []
        self.peaks: dict[Workload, float] = {}

    def add(self, contestant: str, workload: Workload, outcome: Outcome, peers: Sequence[Outcome]) -> None:
        """Adds a contestant's outcome, with its ratios to the peers."""
        if contestant == "fedtune":
            self.peaks[workload] = outcome.peak_mib
        self.rows.append(table_row(contestant, workload, outcome, peers))
        print(markdown_row(self.rows[-1]), flush=True)


def compare(table: Table, few: Workload, rounds: int, workers: int, with_ray: bool) -> None:
    """Measures all contestants on one workload, fedtune for more rounds than the slower peer."""
    many = replace(few, rounds=rounds)
    published = measure(peer_command(few, workers, tuned=False), few)
    table.add("peer, as published", few, published, ())
    tuned = measure(peer_command(few, workers, tuned=True), few)
    table.add("peer, tuned", few, tuned, ())
    table.add("fedtune", many, measure_fedtune(many, local(workers)), (published, tuned))
    if with_ray:
        table.add("fedtune on Ray", many, measure_fedtune(many, ray(workers)), (published, tuned))


def table_row(contestant: str, workload: Workload, outcome: Outcome, peers: Sequence[Outcome]) -> list[str]:
    """Returns one row of the table, with the ratios of rates and of processor time to each of the peers."""
    rates = " and ".join(f"**{outcome.rate / peer.rate:.1f}x**" for peer in peers)
    processor = " and ".join(f"{peer.processor_seconds / outcome.processor_seconds:.1f}x" for peer in peers)
    return [
        contestant,
        "bundled" if workload.base == str(BASE_DIRECTORY) else "large",
        f"{workload.clients:,}",
        str(workload.cohort),
        str(workload.local_steps),
        str(workload.rounds),
        f"{outcome.start_seconds:.1f}",
        f"{outcome.rate:,.0f}",
        f"{outcome.processor_seconds:.2f}",
        "" if outcome.training_seconds is None else f"{outcome.training_seconds:.2f}",
        f"{rates} (CPU {processor})" if peers else "",
        f"{outcome.peak_mib:,.0f}",
        f"{outcome.loss:.3f}",
    ]


def memory_growth(peaks: dict[Workload, float]) -> list[str]:
    """Returns a sentence for each step from one population of the local backend to the next larger one."""
    bundled = {workload: peak for workload, peak in peaks.items() if workload.base == str(BASE_DIRECTORY)}
    steps = CROWD.local_steps
    line_up = sorted((workload.clients, peak) for workload, peak in bundled.items() if workload.local_steps == steps)
    return [
        f"From {fewer:,} to {more:,} clients, fedtune: {1024 * (high - low) / (more - fewer):+.1f} KiB a client."
        for (fewer, low), (more, high) in itertools.pairwise(line_up)
    ]


def write_results(rows: Sequence[Sequence[str]], growth: Sequence[str]) -> None:
    """Writes the table beside this program."""
    from fedtune.core.job.settings import AdapterSettings, ModelSettings
    from fedtune.model.adapted_model import adapter_layout
    from fedtune.model.base_model import load_base

    size = adapter_layout(load_base(ModelSettings()), AdapterSettings(rank=RANK, alpha=ALPHA)).size
    text = [
        "# Simulation: client-rounds an hour and memory, against Flower's published pattern",
        machine_facts("benchmarks/simulation/run.py", sys.argv[1:]),
        "\n".join(map(markdown_row, (COLUMNS, ["---"] * len(COLUMNS), *rows))),
        f"One adapter of {size:,} float32 parameters is {4 * size / 1024:,.0f} KiB.\n" + "\n".join(growth),
        (__doc__ or "").partition("\n\n")[2].strip(),
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
