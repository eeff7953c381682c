"""The contestants of the simulation benchmarks, each a program that is run and measured from outside.

outcome = measure_fedtune(CROWD, local(workers=2))
outcome = measure(peer_command(workload, workers=2, tuned=True), workload)
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from workload import ALPHA, BATCH_TOKENS, EXAMPLES_PER_CLIENT, LEARNING_RATE, RANK, SEED, Workload

from fedtune.server.run_directory import read_rounds

HERE = Path(__file__).parent
CROWD = Workload(clients=1000, cohort=50, rounds=3, local_steps=5)
SAMPLING_SECONDS = 0.5
MIB = 1 << 20
ROUND_LINE = re.compile(r"round (\d+)(?:/\d+)?  .*?loss (\d+\.\d+)")
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",  # otherwise the peer looks up its local model directory on the network
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Outcome:
    """The results of one program.

    Args:
        start_seconds: from launch to the end of round 1, minus one steady round.
        rate: client-rounds an hour after round 1.
        processor_seconds: processor time of a client-round after round 1, in all processes together.
        peak_mib: peak memory of its process tree.
        loss: mean training loss of round 2.
        training_seconds: of a client-round after round 1, from its first local step to its last; fedtune only.
    """

    start_seconds: float
    rate: float
    processor_seconds: float
    peak_mib: float
    loss: float
    training_seconds: float | None = None


def local(workers: int) -> list[str]:
    """Returns the overrides of the default backend."""
    return ["simulation.backend=local", f"simulation.workers={workers}"]


def ray(workers: int) -> list[str]:
    """Returns the overrides of the Ray backend."""
    return ["simulation.backend=ray", f"simulation.workers={workers}"]


def measure_fedtune(
    workload: Workload, backend: Sequence[str], compression: str = "none", python: str = sys.executable
) -> Outcome:
    """Runs the command that a user would type.

    Args:
        python: interpreter of the environment whose fedtune is measured.
    """
    settings = [
        *backend,
        f"model.base={workload.base}",
        "adapter.kind=lora",
        f"adapter.rank={RANK}",
        f"adapter.alpha={ALPHA}",
        f"data.clients={workload.clients}",
        f"data.examples_per_client={EXAMPLES_PER_CLIENT}",
        "data.evaluation=",
        "data.holdout=0.0",
        f"training.local_steps={workload.local_steps}",
        f"training.batch_tokens={BATCH_TOKENS}",
        f"training.learning_rate={LEARNING_RATE}",
        "training.optimizer=adamw",
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
        command = [python, "-m", "fedtune.server.cli", "simulate", *overrides, "--out", f"{folder}/run"]
        outcome = measure(command, workload)
        later = [client for line in read_rounds(Path(folder) / "run")[1:] for client in line["clients"]]
        return replace(outcome, training_seconds=statistics.fmean(client["seconds"] for client in later))


def peer_command(workload: Workload, workers: int, *, tuned: bool) -> list[str]:
    """Returns the peer's command line."""
    values = {**asdict(workload), "workers": workers}
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, str(HERE / "peer.py"), *flags, *(["--tuned"] if tuned else [])]


def measure(command: Sequence[str], workload: Workload) -> Outcome:
    """Runs a program that prints a line a round, and measures its time and memory.

    Raises:
        RuntimeError: it failed, or finished fewer rounds than the workload has; the message has the end of its output.
    """
    ends: list[float] = []
    worked: list[float] = []
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
                    worked.append(sum(map(_processor_seconds, _tree(process.pid))))
                    losses.append(float(match[2]))
            process.wait()
        if process.returncode != 0 or len(ends) != workload.rounds:
            complaints.seek(0)
            tail = "".join([*said, complaints.read()])[-4000:]
            raise RuntimeError(
                f"{len(ends)} of {workload.rounds} rounds, exit status {process.returncode}: {command}\n{tail}"
            )
    steady, processor = ((each[-1] - each[0]) / (len(ends) - 1) for each in (ends, worked))
    return Outcome(
        ends[0] - steady, 3600 * workload.cohort / steady, processor / workload.cohort, peak[0] / MIB, losses[1]
    )


@contextmanager
def _peak_memory(pid: int) -> Iterator[list[float]]:
    """Keeps in a list's one element the highest proportional set size, in bytes, of a process and its descendants."""
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


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _tree_memory(pid: int) -> float:
    return sum(map(_memory, _tree(pid)))


def _memory(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # the process ended meanwhile
        return 0.0


def _processor_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # as above
        return 0.0
    return float(times.user + times.system)
