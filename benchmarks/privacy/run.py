"""The cost of (ε, δ)-differential privacy in quality, with a thousand clients of which a hundred train in a round.

A run is one federation by demo.toml, or by wordnet.toml on the small base of benchmarks/real, with one ε and one seed.
The noise comes from the devices; beside it stand noise that a trusted server adds ("central") and the wrapper of Flower
("flower"), each with as much noise in a mean as the devices' sum to, so at a smaller ε of its own, which the table
names. Other kinds of adapters train by the same job. Where ε = 8 costs much, further rows have the noise of larger
rounds, and other clips: with less noise a larger one is better.

    python benchmarks/privacy/run.py                        # the demo; two hours on two cores, with WordNet four
    python benchmarks/privacy/run.py --base BASE --task TASK            # WordNet too, as benchmarks/real prepares it
    python benchmarks/privacy/run.py --only distributed --seeds 1       # a part
    python benchmarks/privacy/run.py --dry                  # what is missing; writes table and plot again

A finished run is one line of results.jsonl, which is kept: a second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from flower_wrapper import FlowersPrivacy
from privacy_jobs import COHORT, job_paths
from report import publish

from fedtune.core.adapter.layout import AdapterLayout
from fedtune.core.job.job_file import load_job
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.manifest.round_terms import clip_within
from fedtune.core.privacy.budget import certainly_noised, rho_of_round
from fedtune.core.privacy.guarantee import epsilon_of
from fedtune.server.preflight import check_simulation
from fedtune.server.privacy_plan import plan_privacy
from fedtune.server.run_directory import RunDirectory, read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulated_run import open_context, run_job
from fedtune.strategies.assembly import Parts
from fedtune.strategies.cohorts.selection import Rationed, UniformSelection

HERE = Path(__file__).parent
RUNS = HERE / "results.jsonl"
CLEAR = ("secure_aggregation.enabled=false", "compression.form=ring")
KINDS: Mapping[str, tuple[str, ...]] = {
    "core": (),
    "lora": ("adapter.kind=lora", "adapter.rank=16"),
    "ffa": ("adapter.kind=lora", "adapter.rank=16", "federation.aggregation=ffa"),
}


@dataclass(frozen=True)
class Row:
    """A planned run.

    Args:
        noise: who adds it: "none", "distributed", "central", "flower".
        epsilon: that of the job, from which the noise of the devices follows; 0 without.
        clients: clients of a round for which the noise is sized. Of more than the job's 100 only the noise is as of so
            many, ten times as many in all; 100 of them train.
        clip: the job's clip.
    """

    task: str
    kind: str
    noise: str
    epsilon: float
    seed: int
    clients: int = COHORT
    clip: float = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the small base (benchmarks/real/small_base.py)")
    parser.add_argument("--task", type=Path, help="the folder with train.jsonl and eval.jsonl (examples/real-model)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows with this in their name, as --dry prints it")
    parser.add_argument("--dry", action="store_true", help="run nothing; write the table and the plot")
    options = parser.parse_args()
    lines = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()] if RUNS.is_file() else []
    overrides = job_paths(options.base, options.task)
    planned = [row for row in rows(options.seeds) if row.task in overrides and options.only in str(row)]
    missing = [row for row in planned if not any(line["basis"] == _basis(row) for line in lines)]
    for done, row in enumerate(missing):
        print(f"{done + 1} of {len(missing)}: {row}", flush=True)
        if options.dry:
            continue
        lines.append({"basis": _basis(row), "outcome": measure(row, overrides[row.task])})
        with RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    publish([line for line in lines if line["basis"]["job"] == _job_keys(line["basis"]["row"]["task"])])


def rows(seeds: int) -> list[Row]:
    """Returns all rows, those that decide first. At ε = 2 and 1 little is left in any seed, so one is enough."""
    found = [Row("wordnet", "core", "central", 8.0, 0, 800, clip) for clip in (0.25, 0.5, 1.0)]
    found += [
        Row("wordnet", "core", "central", 8.0, 0, 400, 0.5),
        Row("wordnet", "core", "distributed", 8.0, 0, 100, 0.5),
    ]
    for seed in range(seeds):
        found += [Row("demo", "core", "none", 0.0, seed), Row("wordnet", "core", "none", 0.0, seed)]
        found += [Row("demo", "core", noise, 8.0, seed) for noise in ("distributed", "central")]
        found += [Row("wordnet", "core", "distributed", 8.0, seed)]
    found += [Row("wordnet", "core", "central", 8.0, seed, 800, 0.5) for seed in range(seeds)]
    found += [Row("demo", kind, "distributed", 8.0, 0) for kind in ("lora", "ffa")]
    found += [Row("wordnet", "core", "central", 8.0, seed, 400, 0.5) for seed in range(seeds)]
    found += [Row("wordnet", "core", "central", 8.0, 0, COHORT * times) for times in (1, 2, 4)]
    found += [Row("wordnet", "core", "central", 8.0, 0, 200, 0.5)]
    found += [Row("demo", kind, "none", 0.0, 0) for kind in ("lora", "ffa")]
    for seed in range(seeds):
        found += [Row("demo", "core", "flower", 8.0, seed), Row("demo", "core", "distributed", 4.0, seed)]
    found += [Row("demo", "core", "distributed", epsilon, 0) for epsilon in (2.0, 1.0)]
    return list(dict.fromkeys(found))


def measure(row: Row, paths: tuple[str, ...]) -> dict[str, Any]:
    """Runs one federation from its beginning and returns its figures."""
    private = load_job(HERE / f"{row.task}.toml", [*paths, *_settings(row)])
    if row.epsilon:
        private = dataclasses.replace(private, privacy=dataclasses.replace(private.privacy, epsilon=row.epsilon))
    job = _job(row, private, paths)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        context = open_context(check_simulation(job), path, Silent())
        directory = RunDirectory.create(path, job, context.base.digest)
        try:
            summary = run_job(context, directory, Silent(), _parts(row, private, context.model.layout))
        finally:
            directory.close()
        lines = read_rounds(path)
    clients = [client for line in lines for client in line["clients"]]
    outcome = {
        "exact_match": summary["eval_after"]["exact_match"],
        "loss": summary["eval_after"]["loss"],
        "before": summary["eval_before"]["exact_match"],
        "numbers": summary["adapter_parameters"],
        "epsilon": _trusting_epsilon(row, private),
        "delta": private.privacy.delta,
        "noise": _noise(job, context.model.layout),
        "clients": len(clients),
        "bytes_up": sum(client["bytes_up"] for client in clients) / len(clients),
        "seconds": time.perf_counter() - start,
    }
    print(f"  {outcome}", flush=True)
    return outcome


def _job(row: Row, private: Job, paths: tuple[str, ...]) -> Job:
    """Returns the job of a row; `private` is the same with noise of the devices."""
    if row.noise == "distributed":
        return private
    keys = [*paths, *_settings(row), *CLEAR]
    if row.noise == "central":
        keys += ["privacy.mode=central", f"privacy.epsilon={_trusting_epsilon(row, private)!r}"]
    else:
        keys += ["privacy.mode=off"]
    if row.noise == "flower":
        keys = [key for key in keys if "compression" not in key] + ["compression.preset=none"]
    return load_job(HERE / f"{row.task}.toml", keys)


def _settings(row: Row) -> tuple[str, ...]:
    return (*KINDS[row.kind], f"training.seed={row.seed}", f"privacy.clip={row.clip}")


def _parts(row: Row, private: Job, layout: AdapterLayout) -> Parts:
    """Returns the parts that replace the job's: cohorts are the same in all rows."""
    federation = private.federation
    uniform = UniformSelection(federation.clients_per_round, private.training.seed)
    parts = Parts(selection=Rationed(uniform, private.privacy.participations))
    if row.noise != "flower":
        return parts
    rated = with_learning_rate(private, layout)

    def clip(number: int) -> float:
        return clip_within(rated, layout, number, "r", 0.0)

    return dataclasses.replace(parts, aggregator=FlowersPrivacy(_summed_rho(private), clip))


def _noise(job: Job, layout: AdapterLayout) -> float | None:
    """Returns the noise of a mean in clips, over the root of the rounds, by which `fedtune privacy plan` guesses."""
    if job.privacy.mode == "off":
        return None
    plan = plan_privacy(job, layout, job.data.clients)
    share = next(row.share for row in plan.rows if row.epsilon == job.privacy.epsilon)
    return share / sqrt(job.federation.rounds)


def _summed_rho(private: Job, clients: int = COHORT) -> float:
    """Returns ρ of a round against whoever sees the sum alone: all clients' noise counts, not only who must survive.

    Args:
        clients: clients of whose mean it is; with more than train, the noise of a mean is as much smaller.
    """
    rho = rho_of_round(private.privacy) * sum(certainly_noised(private, (COHORT,))) / COHORT
    return rho * (clients / COHORT) ** 2


def _trusting_epsilon(row: Row, private: Job) -> float:
    """Returns the row's own ε: with a trusted server, of as much noise as the devices' sums to."""
    if row.noise in ("none", "distributed"):
        return row.epsilon
    return epsilon_of(_summed_rho(private, row.clients) * private.privacy.participations, private.privacy.delta)


def _basis(row: Row) -> dict[str, Any]:
    """Returns everything that a row's result depends on."""
    return {"row": asdict(row), "job": _job_keys(row.task)}


def _job_keys(task: str) -> dict[str, Any]:
    return tomllib.loads((HERE / f"{task}.toml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
