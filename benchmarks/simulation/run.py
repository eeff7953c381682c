"""How many client-rounds an hour, and how much memory, does `fedtune simulate` need against Flower's published pattern?

The peer (peer.py) follows Flower's LLM fine-tuning app: every client call loads, quantizes and wraps the model anew,
under FedAvg and Flower's Ray engine. All contestants get the same base model, households, batch, learning rate,
precision and local steps, send A and B whole (but for the row that says otherwise), evaluate nothing, see no GPU, and
run as programs of their own, one after another.

    python benchmarks/simulation/run.py                                  # about a quarter of an hour on two idle cores
    python benchmarks/simulation/run.py --clients 10 --local-steps 5     # less

A client-round is one client's part in one round. The hourly rate is taken from the end of round 1 to the end of the
last; "start" is what launch and round 1 cost beyond a steady round. Memory is the highest sum, over the whole tree of
processes, of proportional set sizes, where a page shared by n processes counts 1/n in each. The loss is the cohort's
mean training loss in round 2, to see that all contestants do the same work; at 100 clients their cohorts differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from facts import machine_facts
from workload import ALPHA, BATCH_TOKENS, EXAMPLES_PER_CLIENT, LEARNING_RATE, RANK, SEED, Workload

HERE = Path(__file__).parent
COHORT = 10
CROWD = Workload(clients=1000, cohort=50, rounds=3, local_steps=5)
SAMPLING_SECONDS = 0.5
MIB = 1 << 20
ROUND_LINE = re.compile(r"round (\d+)(?:/\d+)?  .*?loss (\d+\.\d+)")
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",  # otherwise the peer looks for the directory it loads on the network
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
}
COLUMNS = (
    "contestant",
    "clients",
    "a round",
    "local steps",
    "rounds",
    "start s",
    "client-rounds/h",
    "against peer",
    "peak MiB",
    "loss",
)


@dataclass(frozen=True)
class Outcome:
    """What one program did.

    Args:
        start_seconds: from launch to the end of round 1, less one steady round.
        rate: client-rounds an hour after round 1.
        peak_mib: of its process tree.
        loss: mean training loss of round 2.
    """

    start_seconds: float
    rate: float
    peak_mib: float
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--local-steps", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--rounds", type=int, default=6, help="of fedtune, the first one unmeasured")
    parser.add_argument("--peer-rounds", type=int, default=3, help="of the peer, the first one unmeasured")
    parser.add_argument("--workers", type=int, default=2, help="of Ray, each with one core, for the peer and fedtune")
    parser.add_argument("--threads", type=int, default=0, help="of the local backend's one process; 0 is every core")
    parser.add_argument("--no-crowd", action="store_true", help="leave out 1,000 clients")
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    if min(options.rounds, options.peer_rounds) < 2:
        parser.error("--rounds and --peer-rounds: the first round is not measured; expected at least 2")
    rows: list[Sequence[str]] = []
    peaks: dict[Workload, float] = {}

    def report(contestant: str, workload: Workload, outcome: Outcome, peer: Outcome | None) -> None:
        if contestant == "fedtune local":
            peaks[workload] = outcome.peak_mib
        rows.append(table_row(contestant, workload, outcome, peer))
        print(markdown_row(rows[-1]), flush=True)

    print(markdown_row(COLUMNS), markdown_row(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for local_steps in options.local_steps:
        for clients in options.clients:
            few = Workload(clients, min(COHORT, clients), options.peer_rounds, local_steps)
            many = Workload(clients, few.cohort, options.rounds, local_steps)
            peer = measure(peer_command(few, options.workers), few)
            report("peer", few, peer, None)
            report("fedtune local", many, measure_fedtune(many, local(options.threads)), peer)
            report(f"fedtune ray, {options.workers} workers", many, measure_fedtune(many, ray(options.workers)), peer)
    if not options.no_crowd:
        report("fedtune local", CROWD, measure_fedtune(CROWD, local(options.threads)), None)
        compressed = measure_fedtune(CROWD, local(options.threads), "balanced")
        report("fedtune local, compressed", CROWD, compressed, None)
    growth = memory_growth(peaks)
    print("\n".join(growth))
    if not options.dry:
        write_results(rows, growth)


def local(threads: int) -> list[str]:
    """The default backend."""
    return ["simulation.backend=local", f"simulation.threads={threads}"]


def ray(workers: int) -> list[str]:
    """The Ray backend, one core a worker."""
    return ["simulation.backend=ray", f"simulation.workers={workers}", "simulation.threads=1"]


def measure_fedtune(workload: Workload, backend: Sequence[str], compression: str = "none") -> Outcome:
    """Runs the command that a user would type."""
    settings = [
        *backend,
        f"adapter.rank={RANK}",
        f"adapter.alpha={ALPHA}",
        f"data.clients={workload.clients}",
        f"data.examples_per_client={EXAMPLES_PER_CLIENT}",
        "data.evaluation=",
        "data.holdout=0.0",
        f"training.local_steps={workload.local_steps}",
        f"training.batch_tokens={BATCH_TOKENS}",
        f"training.learning_rate={LEARNING_RATE}",
        f"training.seed={SEED}",
        f"federation.rounds={workload.rounds}",
        f"federation.clients_per_round={workload.cohort}",
        "federation.aggregation=fedavg",
        f"compression.preset={compression}",
        "secure_aggregation.enabled=false",
        "export.formats=[]",
    ]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "fedtune.server.cli", "simulate", *overrides, "--out", f"{folder}/run"]
        return measure(command, workload)


def peer_command(workload: Workload, workers: int) -> list[str]:
    """The peer's command line."""
    counts = {**asdict(workload), "workers": workers}
    flags = [part for name, count in counts.items() for part in (f"--{name.replace('_', '-')}", str(count))]
    return [sys.executable, str(HERE / "peer.py"), *flags]


def measure(command: Sequence[str], workload: Workload) -> Outcome:
    """Runs a program that prints a line a round, watching the clock and its memory.

    Raises:
        RuntimeError: it failed, or finished fewer rounds than the workload has; with the end of what it said.
    """
    ends: list[float] = []
    losses: list[float] = []
    with tempfile.TemporaryFile("w+") as complaints:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env={**os.environ, **ENVIRONMENT}
        )
        assert process.stdout is not None
        said = []
        with _peak_memory(process.pid) as peak:
            for line in process.stdout:
                said.append(line)
                if match := ROUND_LINE.match(line):
                    ends.append(time.monotonic() - started)
                    losses.append(float(match[2]))
            process.wait()
        if process.returncode != 0 or len(ends) != workload.rounds:
            complaints.seek(0)
            tail = "".join([*said, complaints.read()])[-4000:]
            raise RuntimeError(
                f"{len(ends)} of {workload.rounds} rounds, exit status {process.returncode}: {command}\n{tail}"
            )
    steady = (ends[-1] - ends[0]) / (len(ends) - 1)
    return Outcome(ends[0] - steady, 3600 * workload.cohort / steady, peak[0] / MIB, losses[1])


def table_row(contestant: str, workload: Workload, outcome: Outcome, peer: Outcome | None) -> list[str]:
    """One line of the table; the ratio is of rates, and of memory in brackets."""
    ratio = f"**{outcome.rate / peer.rate:.1f}x** ({outcome.peak_mib / peer.peak_mib:.2f}x memory)" if peer else ""
    return [
        contestant,
        f"{workload.clients:,}",
        str(workload.cohort),
        str(workload.local_steps),
        str(workload.rounds),
        f"{outcome.start_seconds:.1f}",
        f"{outcome.rate:,.0f}",
        ratio,
        f"{outcome.peak_mib:,.0f}",
        f"{outcome.loss:.3f}",
    ]


def memory_growth(peaks: dict[Workload, float]) -> list[str]:
    """One sentence for each step from one population of the local backend to the next larger one."""
    fewest = min((workload.local_steps for workload in peaks), default=0)
    line_up = sorted((workload.clients, peak) for workload, peak in peaks.items() if workload.local_steps == fewest)
    return [
        f"From {fewer:,} to {more:,} clients, fedtune local: {1024 * (high - low) / (more - fewer):+.1f} KiB a client."
        for (fewer, low), (more, high) in itertools.pairwise(line_up)
    ]


def markdown_row(cells: Sequence[str]) -> str:
    """Cells as a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def write_results(rows: Sequence[Sequence[str]], growth: Sequence[str]) -> None:
    """Keeps the table beside this program."""
    from fedtune.core.job import AdapterSettings, ModelSettings
    from fedtune.model.base import load_base
    from fedtune.model.lora import adapter_layout

    size = adapter_layout(load_base(ModelSettings()), AdapterSettings(rank=RANK, alpha=ALPHA)).size
    text = [
        "# Simulation: client-rounds an hour and memory, against Flower's published pattern",
        machine_facts("benchmarks/simulation/run.py", sys.argv[1:]),
        "\n".join(map(markdown_row, (COLUMNS, ["---"] * len(COLUMNS), *rows))),
        f"One adapter of {size:,} float32 parameters is {4 * size / 1024:,.0f} KiB.\n" + "\n".join(growth),
        (__doc__ or "").partition("\n\n")[2].strip(),
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


@contextmanager
def _peak_memory(pid: int) -> Iterator[list[float]]:
    """A list whose one element is the highest proportional set size, in bytes, of a process and its descendants."""
    peak = [0.0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], _tree_memory(pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _tree_memory(pid: int) -> float:
    total = 0.0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
            continue
    return total


if __name__ == "__main__":
    main()
