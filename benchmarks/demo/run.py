"""How close does the demo's federation come to centralised LoRA on all clients' data, and with how many bytes?

Six rows, each run by `fedtune simulate` itself on the same base, seeds, schedule and evaluation set:

    base                    the untrained adapter
    client alone            one household trains on its own rows only; the mean over all households
    federated, fp32 FedAvg  A and B of rank 16, float32, in the clear
    federated, compressed   the job without secure aggregation: updates compressed, in the clear
    federated, secure       the job as it is (job.toml): compressed, and the server sees only sums
    centralised             one trainer on the pooled rows, in place of the federation's cohort

The two compressed rows train the job's adapter, a core; the others LoRA of rank 16 at LORA_RATE.

The work is matched by optimizer steps of the same batch (training.batch_tokens). With R rounds, cohorts of K out of N
clients and S local steps, a federation takes R·K·S client steps in all. The centralised trainer takes R stages of K·S
steps, as many steps on as many samples; a household alone takes R stages of round(K·S / N) steps, its share of them. As
in a federated round, each stage starts with a new AdamW, on the same schedule at SOLO_RATE times LoRA's learning rate.

    python benchmarks/demo/run.py                                     # job.toml: about ten minutes on two idle cores
    python benchmarks/demo/run.py --set federation.rounds=2 --set training.local_steps=3 --runs /tmp/tiny

Every row is a run directory under --runs: a second call continues where the first one stopped, and repeats only rows
whose job or base model has changed since. Seconds are those of the rounds, without evaluation.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedtune.core.errors import FedtuneError
from fedtune.core.host.process import versions
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.settings import (
    DEMO,
    LORA_RANK,
    AdapterSettings,
    CompressionSettings,
    Job,
    SecureAggregationSettings,
    SimulationSettings,
)
from fedtune.demo import write_federation
from fedtune.model.base_model import load_base
from fedtune.server.run_directory import JOB, SUMMARY, read_rounds, read_summary
from fedtune.server.run_display import Terminal
from fedtune.server.simulation.simulate import resume, simulate

HERE = Path(__file__).parent
# A single trainer takes half the learning rate; with the federation's, where a mean of ten damps noise, it diverged.
SOLO_RATE = 0.5
LORA_RATE = 4e-3
READING = (
    "Bytes are payload bytes of one client-round, counted where messages are written. Every row is scored on the same "
    "evaluation set of all skills; a household alone has seen only those of its own few devices."
)
COLUMNS = ("", "exact match", "of centralised", "loss", "bytes up", "bytes down", "seconds")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        bytes_up: payload bytes of one client-round; None for training without rounds.
        seconds: seconds of training.
    """

    exact_match: float
    loss: float
    bytes_up: float | None = None
    bytes_down: float | None = None
    seconds: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=HERE / "job.toml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="where rows are kept to go on with")
    parser.add_argument("--dry", action="store_true", help="print the table, but leave RESULTS.md as it is")
    options = parser.parse_args()
    try:
        job = load_job(options.job, options.overrides)
        _check(parser, job)
        table = format_table(measure(job, options.runs))
    except FedtuneError as error:
        parser.exit(error.exit_status, f"{error}\n")
    print(f"\n{table}")
    if not options.dry:
        write_results(table, job)


def measure(job: Job, runs: Path) -> dict[str, Row]:
    """Trains the rows that are not trained yet; returns row name -> row."""
    households, pooled = _write_data(job, runs)
    base_digest = load_base(job.model).digest

    def trained(name: str, wanted: Job) -> Path:
        _train(name, wanted, runs / name, base_digest)
        return runs / name

    federated = trained("federated", job)
    compressed = trained("federated-in-the-clear", in_the_clear(job))
    fedavg = trained("federated-fp32-fedavg", fp32_fedavg(job))
    alone = [trained(f"alone-{path.stem}", alone_job(job, path)) for path in households]
    centralised = trained("centralised", centralised_job(job, pooled))
    before = read_summary(federated)["eval_before"]
    return {
        "base": Row(before["exact_match"], before["loss"]),
        f"client alone (mean of {len(alone)})": mean_row([_local_row(path) for path in alone]),
        "federated, fp32 FedAvg": _federated_row(fedavg),
        "federated, compressed": _federated_row(compressed),
        "federated, secure": _federated_row(federated),
        "centralised": _local_row(centralised),
    }


def in_the_clear(job: Job) -> Job:
    """Returns the same federation without secure aggregation."""
    return replace(job, secure_aggregation=SecureAggregationSettings(enabled=False))


def fp32_fedavg(job: Job) -> Job:
    """Returns the same federation without compression: a plain mean of float32 A and B."""
    return replace(
        in_the_clear(job),
        adapter=AdapterSettings("lora", LORA_RANK),
        training=replace(job.training, optimizer="adamw", learning_rate=LORA_RATE),
        federation=replace(job.federation, aggregation="fedavg"),
        compression=CompressionSettings(preset="none"),
    )


def alone_job(job: Job, household: Path) -> Job:
    """Returns a job for one client on its own rows, with its share of the federation's steps."""
    share = max(1, round(_cohort(job) * _local_steps(job) / job.data.clients))
    return _single_trainer(job, household, share)


def centralised_job(job: Job, pooled: Path) -> Job:
    """Returns a job for one trainer on all clients' rows, with all of the federation's steps."""
    return _single_trainer(job, pooled, _cohort(job) * _local_steps(job))


def mean_row(rows: Sequence[Row]) -> Row:
    """Returns the mean of rows that send nothing."""
    return Row(
        statistics.fmean(row.exact_match for row in rows),
        statistics.fmean(row.loss for row in rows),
        seconds=statistics.fmean(row.seconds or 0.0 for row in rows),
    )


def format_table(rows: dict[str, Row]) -> str:
    """Formats the rows as a Markdown table."""
    goal = rows["centralised"].exact_match
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for name, row in rows.items():
        lines.append(
            [
                name,
                f"{row.exact_match:.1%}",
                f"{row.exact_match / goal:.1%}" if goal else "",
                f"{row.loss:.4f}",
                *("" if number is None else f"{number:,.0f}" for number in (row.bytes_up, row.bytes_down, row.seconds)),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_results(table: str, job: Job) -> None:
    """Writes the table beside this program."""
    stated = ", ".join(f"{package} {version}" for package, version in versions().items())
    command = shlex.join(["python", "benchmarks/demo/run.py", *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}"
    text = [
        "# The demo: federated against alone and centralised",
        f"`{command}` on {datetime.date.today():%Y-%m-%d}: {machine}; {stated}.",
        table,
        READING,
        (__doc__ or "").partition("\n\n")[2].strip(),
        f"The job, with its defaults:\n\n```toml\n{dump_job(job)}```",
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


class _Progress(Terminal):
    """A display that shows rounds, but not every run's own table at its end."""

    def end(self, summary: dict[str, Any]) -> None:
        self.note(f"after training: exact match {summary['eval_after']['exact_match']:.1%}")


def _check(parser: argparse.ArgumentParser, job: Job) -> None:
    if job.data.train != DEMO or job.data.evaluation != DEMO:
        parser.error("data.train and data.evaluation must be the demo's: households are what the rows differ in")
    if job.training.local_epochs is not None:
        parser.error("training.local_epochs: the rows are matched by local steps; set training.local_steps")


def _write_data(job: Job, runs: Path) -> tuple[list[Path], Path]:
    """Writes the demo's households as files: one each, and one with all of them."""
    clients, examples, seed = job.data.clients, job.data.examples_per_client, job.training.seed
    folder = runs / f"data-{clients}x{examples}-seed-{seed}"
    write_federation(folder, clients, seed, examples)
    households = sorted((folder / "clients").glob("*.jsonl"))
    pooled = folder / "pooled.jsonl"
    pooled.write_text("".join(path.read_text(encoding="utf-8") for path in households), encoding="utf-8")
    return households, pooled


def _single_trainer(job: Job, data: Path, local_steps: int) -> Job:
    plain = fp32_fedavg(job)
    return replace(
        plain,
        data=replace(job.data, train=str(data.absolute())),
        training=replace(plain.training, local_steps=local_steps, learning_rate=LORA_RATE * SOLO_RATE),
        federation=replace(plain.federation, clients_per_round=1, minimum_clients=1),
        simulation=SimulationSettings(threads=job.simulation.threads),
    )


def _train(name: str, job: Job, path: Path, base_digest: str) -> None:
    """Makes sure that the path has a finished run of the job; an earlier call's run is kept if its job was the same."""
    file = path / JOB
    same = file.is_file() and base_digest in file.read_text(encoding="utf-8") and load_job(file) == job
    if same and (path / SUMMARY).is_file():
        return
    with _Progress() as display:
        display.note(f"\n{name}")
        if same:
            resume(path, display)
        else:
            simulate(job, path, display, force=True)


def _federated_row(path: Path) -> Row:
    rounds = read_rounds(path)
    up, down = (statistics.fmean(line["bytes"][f"{way}_per_client"] for line in rounds) for way in ("up", "down"))
    return replace(_local_row(path), bytes_up=up, bytes_down=down)


def _local_row(path: Path) -> Row:
    after = read_summary(path)["eval_after"]
    return Row(after["exact_match"], after["loss"], seconds=sum(line["seconds"] for line in read_rounds(path)))


def _cohort(job: Job) -> int:
    wanted, population = job.federation.clients_per_round, job.data.clients
    return min(population, wanted) if isinstance(wanted, int) else max(1, round(wanted * population))


def _local_steps(job: Job) -> int:
    return job.training.steps


if __name__ == "__main__":
    main()
