"""How much faster is a simulation whose workers train several clients in one pass, at small steps?

    python benchmarks/simulation/together.py                # about ten minutes

`simulation.together` is 1, 4, 8 and "auto" on the demo, with steps of about one and two examples, for both kinds of
adapter. A run's figures are its median round after the first; of several runs the best counts, and the values take
turns, so that other work on the machine meets all alike. A client-round is one client's part in one round, from the
request to the server's sum, and "CPU s" its processor time in all processes together, which other work on the machine
disturbs less. Ratios are to together = 1 of the same rows. Nothing is evaluated.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from facts import markdown_row, write_table
from workload import SEED

from fedtune.core.job.job_file import load_job
from fedtune.server.run_directory import RunDirectory
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

HERE = Path(__file__).parent
RESULTS = HERE / "TOGETHER.md"
TITLE = "Clients side by side: client-rounds a second against one after another"
TOGETHER = ("1", "4", "8", "auto")
KINDS = {"core, Muon": ("adapter.kind=core",), "LoRA, AdamW": ("adapter.kind=lora",)}
BATCHES = {64: "1", 112: "2"}  # tokens a step: an example of the demo has 25 to 57, padded to a multiple of 8


@dataclass(frozen=True)
class Outcome:
    """The results of one run.

    Args:
        rate: client-rounds a second.
        processor_seconds: processor time of a client-round, in all processes together.
        together: clients in a pass, as the run recorded it.
    """

    rate: float
    processor_seconds: float
    together: int


class Clock(Silent):
    """Notes when each round ends, and the processor time until then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.worked: list[float] = []

    def round(self, record: Any) -> None:
        del record
        self.ends.append(time.monotonic())
        own = psutil.Process()
        spent = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        self.worked.append(sum(float(times.user + times.system) for times in spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, help="of every round")
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="of a run, the first one unmeasured")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each row, of which the best counts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print the table, but leave TOGETHER.md as it is")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: the first round is not measured; expected at least 2")
    columns = (
        "adapter",
        "tokens a step",
        "examples a step",
        "together",
        "client-rounds/s",
        "against 1",
        "CPU s",
        "CPU against 1",
    )
    lines = [markdown_row(columns), markdown_row(["---"] * len(columns))]
    print(*lines, sep="\n", flush=True)
    for kind, settings in KINDS.items():
        for tokens, examples in BATCHES.items():
            best = measure([*settings, f"training.batch_tokens={tokens}"], options)
            for asked in TOGETHER:
                found, serial = best[asked], best["1"]
                named = f"auto ({found.together})" if asked == "auto" else asked
                ratio = f"**{found.rate / serial.rate:.2f}x**"
                processor = f"{serial.processor_seconds / found.processor_seconds:.2f}x"
                figures = [f"{found.rate:.1f}", ratio, f"{found.processor_seconds:.3f}", processor]
                lines.append(markdown_row([kind, str(tokens), examples, named, *figures]))
                print(lines[-1], flush=True)
    if not options.dry:
        write_table(
            RESULTS,
            "Clients side by side: client-rounds a second against one after another",
            "benchmarks/simulation/together.py",
            lines,
            __doc__ or "",
        )


def measure(settings: Sequence[str], options: argparse.Namespace) -> dict[str, Outcome]:
    """Returns the best outcome for each value of `simulation.together`."""
    best: dict[str, Outcome] = {}
    for _ in range(options.repetitions):
        for asked in TOGETHER:
            outcome = measure_once([*settings, f"simulation.together={asked}"], options)
            before = best.get(asked, outcome)
            processor = min(outcome.processor_seconds, before.processor_seconds)
            best[asked] = Outcome(max(outcome.rate, before.rate), processor, outcome.together)
    return best


def measure_once(settings: Sequence[str], options: argparse.Namespace) -> Outcome:
    """Runs one job in this process and its forks."""
    job = load_job(
        None,
        [
            *settings,
            f"data.clients={options.clients}",
            "data.evaluation=",
            "data.holdout=0.0",
            "data.sequence_length=64",
            f"federation.clients_per_round={options.clients}",
            f"federation.rounds={options.rounds}",
            f"simulation.workers={options.workers}",
            "secure_aggregation.enabled=false",
            f"training.local_steps={options.local_steps}",
            f"training.seed={SEED}",
        ],
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        simulate(job, path, clock)
        directory = RunDirectory.open(path)
        try:
            together = directory.job().simulation.together
        finally:
            directory.close()
    assert together != "auto"
    seconds, worked = (
        statistics.median(late - early for early, late in itertools.pairwise(each))
        for each in (clock.ends, clock.worked)
    )
    return Outcome(options.clients / seconds, worked / options.clients, together)


if __name__ == "__main__":
    main()
